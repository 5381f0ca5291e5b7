"""How a run may end badly, with which verdict and sentence, and that the next request runs at once."""

# A block's variables are what it saves: ruff cannot know that they are used.
# ruff: noqa: F841

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
import zstandard

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.contract import Outcome, Verdict
from tests.worker.service import PROMPT, Caught, Service, content, exists

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _an_honest_request_runs_afterwards(service: Service, model: Any) -> Iterator[None]:
    yield
    service.revive()
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output.save()
    assert service.saves(caught)["out"].shape[-1] == 512


def failed(outcome: Outcome, *words: str) -> str:
    assert outcome.verdict is Verdict.FAILED, outcome
    assert outcome.result is None
    for word in words:
        assert word in outcome.description
    return outcome.description


def test_an_exception_shows_the_users_lines_alone(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        hidden = model.transformer.h[1].output[0]
        raise KeyError("mine")
    text = failed(service.outcome(caught), "KeyError: 'mine'", "test_bad_endings.py", "raise KeyError")
    assert text.startswith("Traceback")
    assert "nnsight" not in text
    assert "edif_hpc" not in text


def test_an_exception_with_a_cause(service: Service, model: Any, caught: Caught) -> None:
    with model.session(backend=caught):
        zero = 0
        try:
            with model.trace(PROMPT):
                1 / zero
        except ZeroDivisionError as error:
            raise ValueError("outer") from error
    text = failed(service.outcome(caught), "ZeroDivisionError", "direct cause", "ValueError: outer")
    assert "nnsight" not in text
    assert "edif_hpc" not in text


def test_leaving_by_exit(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        import sys

        sys.exit("bye")
    failed(service.outcome(caught), "SystemExit")


def test_meta_comes_with_a_failure(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        raise ValueError("x")
    assert service.outcome(caught).meta["runtime"] > 0


def test_the_time_limit(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        while True:
            pass
    began = time.monotonic()
    failed(service.outcome(caught, run_seconds=1.0), "time limit of 1 s")
    assert time.monotonic() - began < 5


def test_the_memory_limit(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        big = torch.ones(1024, 1024, 1024).save()
    text = failed(service.outcome(caught, memory_bytes=512 * MIB), "memory", "512 MiB")
    assert "Traceback" not in text


def test_the_memory_limit_of_python_objects(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        big = bytearray(4 * 1024**3)
    failed(service.outcome(caught, memory_bytes=512 * MIB), "memory", "512 MiB")


def test_the_cpu_limit(isolated: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        os.kill(os.getpid(), signal.SIGXCPU)
    failed(isolated.outcome(caught), "CPU time")


def test_a_segmentation_fault(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        import ctypes

        ctypes.string_at(0)
    failed(service.outcome(caught), "segmentation fault")


def test_an_abort(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        os.abort()
    failed(service.outcome(caught), "abort")


def test_a_silent_exit(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        os._exit(0)
    failed(service.outcome(caught), "exit code 0")


def running(service: Service, caught: Caught) -> tuple[asyncio.Future[Outcome], str]:
    """Start a run and wait until its code runs."""
    spec = service.request(caught)

    async def start() -> asyncio.Future[Outcome]:
        started = asyncio.Event()
        task = asyncio.ensure_future(service.host.run(spec, caught.blob, lambda line: started.set(), lambda: None))
        await asyncio.wait_for(started.wait(), 30)
        return task

    return service.loop.run_until_complete(start()), spec.run_id


@pytest.fixture
def endless(model: Any, caught: Caught) -> Caught:
    with model.trace(PROMPT, backend=caught):
        print(os.getpid())
        while True:
            pass
    return caught


def test_a_kill_from_outside_is_no_fault_of_the_user(service: Service, endless: Caught) -> None:
    pids: list[int] = []
    spec = service.request(endless)

    async def kill_it() -> Outcome:
        said = asyncio.Event()

        def hear(line: str) -> None:
            pids.append(int(line))
            said.set()

        task = asyncio.ensure_future(service.host.run(spec, endless.blob, hear, lambda: None))
        await asyncio.wait_for(said.wait(), 30)
        os.kill(pids[0], signal.SIGKILL)
        return await task

    outcome = service.loop.run_until_complete(kill_it())
    assert outcome.verdict is Verdict.LOST
    assert "signal 9" in outcome.description


def test_cancelling(service: Service, endless: Caught) -> None:
    task, run_id = running(service, endless)
    began = time.monotonic()
    service.host.cancel(run_id)
    outcome = service.loop.run_until_complete(task)
    assert outcome.verdict is Verdict.CANCELLED
    assert time.monotonic() - began < 1


def test_a_cancelled_task_takes_its_run_along(service: Service, endless: Caught) -> None:
    task, _ = running(service, endless)
    busy = set(service.host.pids().values())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        service.loop.run_until_complete(task)
    if service.level is not Isolation.NONE:
        deadline = time.monotonic() + 10
        while len([pid for pid in busy if exists(pid)]) == len(busy) and time.monotonic() < deadline:
            service.loop.run_until_complete(asyncio.sleep(0.02))
        assert len([pid for pid in busy if exists(pid)]) < len(busy)


def test_cancelling_one_that_waits_behind_another(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        print("here")
        time.sleep(1)
        out = model.lm_head.output.save()
    first, _ = running(service, caught)
    spec = service.request(caught)

    async def second() -> tuple[Outcome, Outcome]:
        task = asyncio.ensure_future(service.host.run(spec, caught.blob, lambda line: None, lambda: None))
        await asyncio.sleep(0.01)
        service.host.cancel(spec.run_id)
        return await first, await task

    one, two = service.loop.run_until_complete(second())
    assert one.verdict is Verdict.COMPLETED
    content(one)
    assert two.verdict is Verdict.CANCELLED


@pytest.mark.parametrize("compress", [True, False])
def test_a_corrupt_payload(service: Service, compress: bool) -> None:
    for blob in (b"", b"rubbish" * 20, b"\x80\x04\x95rubbish"):
        caught = Caught(compress)
        caught.blob = blob
        text = failed(service.outcome(caught), "send it again")
        assert "Traceback" not in text


def test_a_truncated_payload(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output.save()
    caught.blob = caught.blob[: len(caught.blob) // 2]
    failed(service.outcome(caught), "zstd", "send it again")


@pytest.mark.parametrize("announced", [True, False])
def test_a_bomb(service: Service, announced: bool) -> None:
    caught = Caught()
    compressor = zstandard.ZstdCompressor(write_content_size=announced)
    caught.blob = compressor.compress(bytes(300 * MIB))
    failed(service.outcome(caught), "larger than the limit of 256 MiB")


def test_a_module_that_the_service_lacks(
    service: Service, model: Any, caught: Caught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def same(value):\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    helper = importlib.import_module("only_here").same
    with model.trace(PROMPT, backend=caught):
        out = helper(model.lm_head.output).save()
    failed(service.outcome(caught), "nnsight.register('only_here')")


def test_a_module_that_the_model_lacks(service: Service, model: Any, caught: Caught) -> None:
    block = model.transformer.h[1]
    path, block.path = block.path, "model.transformer.h.77"
    tagged = block._module.__dict__.pop("_persistent_id", None)
    try:
        with model.trace(PROMPT, backend=caught):
            out = model.lm_head.output.save()
    finally:
        block.path = path
        block._module.__dict__.pop("_persistent_id", None)
        if tagged:
            block._module._persistent_id = tagged
    failed(service.outcome(caught), "h.77", "transformers version")


@pytest.mark.parametrize("way", [(True, False), (False, False), (True, True)], ids=["zstd", "plain", "planes"])
def test_a_result_that_is_too_large(service: Service, model: Any, way: tuple[bool, bool]) -> None:
    caught = Caught(*way)
    with model.trace(PROMPT, backend=caught):
        out = torch.rand(3_000_000).save()
    failed(service.outcome(caught, result_bytes=8 * MIB), "8 MiB", "save fewer")


@pytest.mark.parametrize("planes", [False, True], ids=["zstd", "planes"])
def test_a_value_that_cannot_be_sent(service: Service, model: Any, planes: bool) -> None:
    caught = Caught(planes=planes)
    with model.trace(PROMPT, backend=caught):
        fine = model.lm_head.output.save()
        odd = nnsight.save(number for number in range(3))
    failed(service.outcome(caught), "'odd'", "cannot be sent back")


def test_strays_end_with_their_executor(isolated: Service, model: Any, caught: Caught) -> None:
    if isolated.level is not Isolation.PROCESS:
        pytest.skip("under locked nothing can be forked")
    with model.trace(PROMPT, backend=caught):
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.pause()
            os._exit(0)
        pid = nnsight.save([child])
    pid = isolated.saves(caught)["pid"][0]
    deadline = time.monotonic() + 10
    while exists(pid) and time.monotonic() < deadline:
        isolated.loop.run_until_complete(asyncio.sleep(0.02))
    assert not exists(pid)


def test_garbage_on_the_channel(isolated: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        os.write(3, b"garbage")
        signal.pause()
    failed(isolated.outcome(caught), "meddled")
