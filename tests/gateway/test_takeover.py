"""`edif-hpc gateway --takeover`: the port goes to a new gateway while the old one serves what it has to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from edif_hpc.fleet import process, state
from tests.support.servers import eventually

from .scene import Scene, Worker, frames, scene


@pytest.fixture
def bare(stage: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A home on the same servers, and no gateway yet."""
    with scene(tmp_path_factory.mktemp("takeover") / "home", stage.redis, stage.store, start=False) as found:
        yield found


@contextmanager
def gateway(place: Scene, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more gateway by the command line, killed at the end."""
    command = [sys.executable, "-m", "edif_hpc.cli", "gateway", "--home", str(place.home.root), *options]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDIF_HPC_", "NDIF_"))}
    with (place.home.logs / "gateway.log").open("a") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env=kept)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def recorded(place: Scene) -> int | None:
    record = process.living(place.home, "gateway")
    return record and record.pid


def test_the_old_gateway_drains_and_the_new_one_answers(bare: Scene) -> None:
    with gateway(bare) as old:
        eventually(bare.answers, 60.0, "the old gateway answering")
        with Worker(bare.redis, bare.store) as worker, bare.socket() as (websocket, session):
            request_id = bare.submit(b"hold", session=session)
            eventually(lambda: bare.get(f"/response/{request_id}").json()["status"] == "RUNNING", 60.0, "RUNNING")
            with gateway(bare, "--takeover") as new:
                eventually(lambda: '"draining"' in bare.log(), 60.0, "the old gateway draining")
                assert all(bare.answers() for _ in range(20))
                assert (old.poll(), recorded(bare)) == (None, new.pid)
                worker.release.set()
                assert isinstance(frames(websocket)[-1], bytes)
                websocket.close()
                assert old.wait(60) == 0
                assert bare.answers()
                assert recorded(bare) == new.pid


def test_without_a_gateway_there_is_nothing_to_take_over(bare: Scene) -> None:
    with gateway(bare, "--takeover"):
        eventually(bare.answers, 60.0, "the gateway answering")


def test_a_second_gateway_is_refused_without_it(bare: Scene) -> None:
    with gateway(bare):
        eventually(bare.answers, 60.0, "the gateway answering")
        with gateway(bare) as second:
            assert second.wait(60) == 1
        assert "runs already" in bare.log()


def test_a_home_with_a_supervisor_keeps_its_gateway(bare: Scene) -> None:
    lock = state.lock(bare.home)
    assert lock is not None
    try:
        with gateway(bare) as old:
            eventually(bare.answers, 60.0, "the gateway answering")
            with gateway(bare, "--takeover") as second:
                assert second.wait(60) == 1
            assert "kept running by `edif-hpc up`" in bare.log()
            assert (bare.answers(), recorded(bare)) == (True, old.pid)
    finally:
        os.close(lock)
