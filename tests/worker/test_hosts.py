"""The life of a host: how it starts and refuses to, what its processes hold, and that nothing outlives the agent."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from edif_hpc.core.errors import HostError, ModelKeyError
from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.contract import HostSpec, Verdict
from edif_hpc.worker.host_client import ModelHost
from tests.worker.conftest import spec_of
from tests.worker.service import PROMPT, Caught, Service, exists, open_descriptors


@pytest.fixture
def spec(model: Any, hub: Path, adapter: Path) -> Iterator[HostSpec]:
    spec = spec_of(model, hub, adapter, Isolation.PROCESS, adapters={})
    yield spec
    shutil.rmtree(spec.scratch)


Started = Callable[[], set[int]]


@pytest.fixture
def started() -> Started:
    """Tells which worker processes below this one, or below nobody, have been started since."""

    def running() -> set[int]:
        below = {child.pid for child in psutil.Process().children(recursive=True)}
        found = set()
        for process in psutil.process_iter(["cmdline", "ppid"]):
            command = " ".join(process.info["cmdline"] or [])
            near = process.pid in below or process.info["ppid"] == 1
            if near and "-m edif_hpc.worker." in command and exists(process.pid):
                found.add(process.pid)
        return found

    before = running()
    return lambda: running() - before


def refused(loop: asyncio.AbstractEventLoop, spec: HostSpec) -> str:
    before = open_descriptors()
    with pytest.raises(HostError) as caught:
        loop.run_until_complete(ModelHost.start(spec, lambda text: None))
    assert open_descriptors() == before
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("level", [Isolation.NONE, Isolation.PROCESS], ids=str)
def test_a_model_that_is_not_there(loop: asyncio.AbstractEventLoop, spec: HostSpec, level: Isolation) -> None:
    key = spec.model_key.replace("edif-test/gpt2", "edif-test/nowhere")
    text = refused(loop, replace(spec, model_key=key, isolation=level, required=Isolation.NONE))
    assert "edif-test/nowhere is not complete in the model cache" in text


def test_a_class_that_is_not_allowed(loop: asyncio.AbstractEventLoop, spec: HostSpec) -> None:
    with pytest.raises(ModelKeyError):
        loop.run_until_complete(ModelHost.start(replace(spec, model_key="os.system:{}"), lambda text: None))


def test_a_level_that_is_required_but_not_asked_for(loop: asyncio.AbstractEventLoop, spec: HostSpec) -> None:
    none = replace(spec, isolation=Isolation.NONE, required=Isolation.LOCKED)
    assert "solation locked is required" in refused(loop, none)
    assert "solation locked is required" in refused(loop, replace(none, isolation=Isolation.PROCESS))


def test_a_start_that_is_cancelled_leaves_nothing(
    loop: asyncio.AbstractEventLoop, spec: HostSpec, started: Started
) -> None:
    before = open_descriptors()

    async def start_and_cancel() -> None:
        said = asyncio.Event()
        task = asyncio.ensure_future(ModelHost.start(spec, lambda text: said.set()))
        await said.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run_until_complete(start_and_cancel())
    assert open_descriptors() == before
    assert all_gone(started)


def test_progress_is_told(loop: asyncio.AbstractEventLoop, spec: HostSpec, started: Started) -> None:
    told: list[str] = []
    host = loop.run_until_complete(ModelHost.start(spec, told.append))
    loop.run_until_complete(host.close())
    assert told[:2] == ["importing libraries", "loading the weights"]
    assert all_gone(started)


@pytest.mark.gpu
@pytest.mark.parametrize("victim", ["host", "zygote"])
def test_a_host_that_dies_tells_and_loses_its_runs(
    loop: asyncio.AbstractEventLoop, spec: HostSpec, started: Started, model: Any, caught: Caught, victim: str
) -> None:
    with model.trace(PROMPT, backend=caught):
        print("here")
        while True:
            pass
    service = Service(loop, spec)

    async def kill() -> None:
        said = asyncio.Event()
        request = service.request(caught)
        task = asyncio.ensure_future(service.host.run(request, caught.blob, lambda line: said.set(), lambda: None))
        await said.wait()
        os.kill(service.host.pids()[victim], signal.SIGKILL)
        assert (await asyncio.wait_for(task, 10)).verdict is Verdict.LOST
        assert "ended" in await asyncio.wait_for(service.host.died, 10)

    loop.run_until_complete(kill())
    assert not service.host.alive
    with pytest.raises(HostError):
        service.outcome(caught)
    service.close()
    assert all_gone(started)


@pytest.mark.gpu
def test_a_spare_that_is_killed_is_replaced(isolated: Service, model: Any) -> None:
    for _ in range(3):
        for name, pid in isolated.host.pids().items():
            if name.startswith("executor"):
                os.kill(pid, signal.SIGKILL)
        isolated.loop.run_until_complete(asyncio.sleep(0.3))
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output.save()  # noqa: F841
    assert "out" in isolated.saves(caught)
    assert isolated.host.alive


@pytest.mark.gpu
def test_no_descriptor_is_lost(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        raise ValueError("x")
    counts = []
    for _ in range(4):
        for _ in range(5):
            service.outcome(caught)
        service.loop.run_until_complete(asyncio.sleep(0.5))
        counts.append(open_descriptors())
    assert max(counts[1:]) - min(counts[1:]) <= 2  # a spare may be on its way


def test_its_processes_hold_no_secret_of_the_agent(
    loop: asyncio.AbstractEventLoop, spec: HostSpec, model: Any, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "NDIF_API_KEY", "HF_TOKEN", "EDIF_HPC_REDIS", "REDIS_PASSWORD"):
        monkeypatch.setenv(name, "hush-hush")
    with model.trace(PROMPT, backend=caught):
        seen = [name for name, value in os.environ.items() if "hush" in value]
        out = (model.lm_head.output.sum() * 0 + len(seen)).save()  # noqa: F841
    for level in (Isolation.NONE, Isolation.PROCESS):
        service = Service(loop, replace(spec, isolation=level, required=level))
        if os.geteuid() == 0:  # nobody else may look into a process that is not dumpable
            for pid in service.host.pids().values():
                assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert service.saves(caught)["out"] == 0
        service.close()


def test_host_and_zygote_belong_to_nobody_but_root(service: Service) -> None:
    for name, pid in service.host.pids().items():
        if name in ("host", "zygote"):
            assert Path(f"/proc/{pid}/environ").stat().st_uid == 0


AGENT = """
import asyncio, json, sys
from pathlib import Path
from edif_hpc.worker.host_client import ModelHost
from edif_hpc.worker.messages import host_spec

async def main():
    host = await ModelHost.start(host_spec(json.loads(sys.argv[1])), lambda text: None)
    await asyncio.sleep(0.5)
    print(json.dumps(host.pids()), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_nothing_outlives_the_agent(spec: HostSpec, started: Started) -> None:
    from edif_hpc.worker.channel import encode
    from edif_hpc.worker.messages import host_spec_message

    message = encode(host_spec_message(spec)).decode()
    agent = subprocess.Popen([sys.executable, "-c", AGENT, message], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    try:
        assert "executor" in agent.stdout.readline()
        assert len(started()) >= 4  # host, zygote, two spares
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()
    assert all_gone(started)


def test_the_agents_side_needs_no_torch() -> None:
    code = (
        "import sys, edif_hpc.worker.host_client, edif_hpc.worker.contract;"
        "assert not {'torch', 'nnsight', 'transformers', 'zstandard'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def all_gone(started: Started) -> bool:
    """A zygote that was still starting needs a moment to see that its host is gone."""
    deadline = time.monotonic() + 20
    while started() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not started()
