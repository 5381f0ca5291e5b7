"""A model on two ranks: who refuses it, how ranks end with their host, and what becomes of one that dies or strays."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from edif_hpc.core.errors import HostError
from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.contract import HostSpec, Outcome, Verdict
from edif_hpc.worker.host_client import ModelHost
from tests.support import models
from tests.worker.service import PROMPT, Caught, Service, exists, open_descriptors, scratch

pytestmark = pytest.mark.xdist_group("ranks")

RANK_SECONDS = 3.0
"""How long one rank waits for another here."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), ["llama", "gpt2"])
    models.offline_client(hub)
    torch.set_num_threads(1)
    return hub


@pytest.fixture(scope="module")
def model(cache: Path) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(models.repo_id("llama"), task="text-generation")


@pytest.fixture(scope="module")
def spec(model: Any, cache: Path) -> Iterator[HostSpec]:
    spec = HostSpec(
        model.to_model_key(), cache, scratch(), isolation=Isolation.NONE, ranks=2, rank_seconds=RANK_SECONDS
    )
    yield spec
    shutil.rmtree(spec.scratch)


@pytest.fixture(scope="module")
def service(loop: asyncio.AbstractEventLoop, spec: HostSpec) -> Iterator[Service]:
    service = Service(loop, spec)
    yield service
    pids = service.host.pids().values()
    service.close()
    assert not [pid for pid in pids if exists(pid)]


@pytest.fixture
def good(model: Any) -> Caught:
    """A block that every rank can run."""
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        logits = model.lm_head.output.clone().save()  # noqa: F841 - saved
    return caught


@pytest.fixture
def restored(service: Service, good: Caught) -> Iterator[None]:
    """Whatever a test did to the ranks, the next request is served."""
    yield
    until_settled(service)
    assert service.saves(good)["logits"].shape == (1, 9, 512)


def until_settled(service: Service) -> None:
    """Bring the host back if it has ended, or is about to: its last words come after its last answer."""

    async def ended() -> None:
        deadline = time.monotonic() + 1.0
        while service.host.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    service.loop.run_until_complete(ended())
    service.revive()


def failed(outcome: Outcome) -> str:
    assert outcome.verdict is Verdict.FAILED
    assert outcome.result is None
    assert "\n" not in outcome.description
    return outcome.description


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Isolation.PROCESS, Isolation.LOCKED], ids=str)
def test_above_level_none_it_is_refused_by_the_key(
    loop: asyncio.AbstractEventLoop, spec: HostSpec, level: Isolation
) -> None:
    with pytest.raises(
        HostError, match=f"models.tensor_parallel is 2, .* not at {level}: set worker.isolation to none"
    ):
        loop.run_until_complete(ModelHost.start(replace(spec, isolation=level), lambda text: None))


def test_an_architecture_without_a_plan_is_refused(
    loop: asyncio.AbstractEventLoop, spec: HostSpec, cache: Path
) -> None:
    before = open_descriptors()
    other = replace(spec, model_key=spec.model_key.replace("edif-test/llama", "edif-test/gpt2"))
    with pytest.raises(HostError, match=r"edif-test/gpt2 cannot be split over 2 ranks .* plan for a GPT2LMHeadModel"):
        loop.run_until_complete(ModelHost.start(other, lambda text: None))
    assert open_descriptors() == before


# -- what each rank is ------------------------------------------------------------------------------------------------


def test_each_rank_holds_its_part_and_the_threads_it_was_given(service: Service, model: Any, spec: HostSpec) -> None:
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        held = model.model.layers[0].mlp.up_proj.weight
        part = torch.tensor(held.to_local().shape).save()  # noqa: F841 - saved
        weight = held.save()  # noqa: F841 - saved
        threads = torch.tensor(torch.get_num_threads()).save()  # noqa: F841 - saved
    found = service.saves(caught)
    assert found["part"].tolist() == [64, 64]
    assert found["weight"].shape == (128, 64)
    assert found["threads"] == spec.threads
    host, other = (psutil.Process(service.host.pids()[name]) for name in ("host", "rank-1"))
    assert other.ppid() == host.pid
    assert service.host.memory_bytes > host.memory_info().rss * 1.5  # both ranks are counted


def test_random_numbers_are_the_same_on_all_ranks_and_new_each_time(service: Service, model: Any) -> None:
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        drawn = torch.randn(4).save()  # noqa: F841 - saved
    assert not torch.equal(service.saves(caught)["drawn"], service.saves(caught)["drawn"])


def test_what_is_printed_is_told_once(service: Service, model: Any) -> None:
    caught, told = Caught(), []
    with model.trace(PROMPT, backend=caught):
        print("here")
    assert service.outcome(caught, on_log=told.append).verdict is Verdict.COMPLETED
    assert told == ["here"]


def test_the_users_own_error_is_shown_and_the_ranks_stay(service: Service, model: Any, good: Caught) -> None:
    caught, pids = Caught(), service.host.pids()
    with model.trace(PROMPT, backend=caught):
        middle = model.model.layers[1].output
        middle[:] = middle @ torch.zeros(3, 3)
    outcome = service.outcome(caught)
    assert outcome.verdict is Verdict.FAILED
    assert outcome.description.startswith("Traceback")
    assert "mat1 and mat2" in outcome.description
    assert "logits" in service.saves(good)
    assert service.host.pids() == pids


# -- ranks that stray -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored")
def test_a_rank_that_saves_something_else_fails_the_request(service: Service, model: Any) -> None:
    caught, pids = Caught(), service.host.pids()
    with model.trace(PROMPT, backend=caught):
        mine = torch.tensor(os.getpid()).save()  # noqa: F841 - saved
    assert "did not all do the same (rank 1 saved other values than rank 0)" in failed(service.outcome(caught))
    until_settled(service)
    assert service.host.pids() == pids  # they took the same steps


@pytest.mark.usefixtures("restored")
def test_a_rank_that_fails_alone_is_told_and_waited_for_no_longer_than_said(service: Service, model: Any) -> None:
    caught, pids = Caught(), service.host.pids()
    with model.trace(PROMPT, backend=caught):
        if os.environ["RANK"] == "1":
            raise ValueError("only here")
        logits = model.lm_head.output.save()  # noqa: F841 - saved
    began = time.monotonic()
    sentence = failed(service.outcome(caught))
    assert time.monotonic() - began < 2 * RANK_SECONDS + 5
    assert "rank 1 failed with 'ValueError: only here'" in sentence
    until_settled(service)
    assert service.host.pids() != pids


@pytest.mark.usefixtures("restored")
def test_a_rank_that_reads_what_the_other_does_not(service: Service, model: Any) -> None:
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        if os.environ["RANK"] == "1":
            model.model.layers[1].self_attn.q_proj.output.sum()
        logits = model.lm_head.output.save()  # noqa: F841 - saved
    assert "did not all do the same" in failed(service.outcome(caught))


@pytest.mark.usefixtures("restored")
def test_inside_a_split_module_source_shows_a_part_and_saving_it_is_refused(service: Service, model: Any) -> None:
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        inner = model.model.layers[0].self_attn.source.attention_interface_1.output[0].save()  # noqa: F841 - saved
    assert ".source" in failed(service.outcome(caught))


# -- ranks that end ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored")
def test_a_rank_that_is_killed_fails_its_request(service: Service, model: Any) -> None:
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        logits = model.lm_head.output.save()  # noqa: F841 - saved
    assert "Rank 1 of the 2 that hold edif-test/llama was killed by SIGKILL" in failed(service.outcome(caught))


@pytest.mark.usefixtures("restored")
def test_a_rank_that_ends_while_nothing_runs_ends_the_host(service: Service) -> None:
    os.kill(service.host.pids()["rank-1"], signal.SIGKILL)
    said = service.loop.run_until_complete(asyncio.wait_for(asyncio.shield(service.host.died), 10))
    assert said == "Rank 1 of the 2 that hold edif-test/llama was killed by SIGKILL."


@pytest.mark.parametrize("how", ["cancel", "host"])
@pytest.mark.usefixtures("restored")
def test_a_run_that_is_stopped_takes_every_rank_along(service: Service, model: Any, how: str) -> None:
    caught, pids = Caught(), service.host.pids()
    with model.trace(PROMPT, backend=caught):
        print("here")
        while True:
            model.lm_head.weight.full_tensor()
    spec = service.request(caught)

    async def stop() -> Outcome:
        said = asyncio.Event()
        task = asyncio.ensure_future(service.host.run(spec, caught.blob, lambda line: said.set(), lambda: None))
        await asyncio.wait_for(said.wait(), 30)
        if how == "cancel":
            service.host.cancel(spec.run_id)
        else:
            os.kill(pids["host"], signal.SIGKILL)
        return await asyncio.wait_for(task, 30)

    outcome = service.loop.run_until_complete(stop())
    assert outcome.verdict is (Verdict.CANCELLED if how == "cancel" else Verdict.LOST)
    deadline = time.monotonic() + 10
    while [pid for pid in pids.values() if exists(pid)] and time.monotonic() < deadline:
        service.loop.run_until_complete(asyncio.sleep(0.02))
    assert not [pid for pid in pids.values() if exists(pid)]


def test_a_start_that_is_cancelled_leaves_no_rank(loop: asyncio.AbstractEventLoop, spec: HostSpec) -> None:
    before, seen = below(), set[int]()

    async def start_and_cancel() -> None:
        task = asyncio.ensure_future(ModelHost.start(spec, lambda text: None))
        deadline = time.monotonic() + 30
        while len(seen) < 2 and time.monotonic() < deadline:
            seen.update(below() - before)
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run_until_complete(start_and_cancel())
    assert len(seen) == 2
    deadline = time.monotonic() + 20
    while any(map(exists, seen)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in seen if exists(pid)]


def below() -> set[int]:
    """The processes that this one has started, and theirs."""
    return {child.pid for child in psutil.Process().children(recursive=True)}
