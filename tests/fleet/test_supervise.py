"""A supervisor whose home is deleted under it, with real processes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edif_hpc.core.home import Home
from edif_hpc.fleet import process
from tests.cli.stack import COMPONENTS, Stack, stack
from tests.support.servers import eventually, free_port


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as made:
        yield made


@pytest.fixture
def up(own: Stack) -> Stack:
    own.up()
    eventually(lambda: set(COMPONENTS) <= set(own.pids()), what="all components")
    return own


def test_a_deleted_home_ends_everything(up: Stack) -> None:
    with subprocess.Popen(["sleep", "600"]) as worker:
        process.write(Home(up.home), "worker-by-hand", worker.pid)
        eventually(lambda: _ticked(up), what="the supervisor looking around")

        def gone() -> bool:
            shutil.rmtree(up.home, ignore_errors=True)  # again and again: who lives still writes
            return not up.home.exists()

        eventually(gone, what="the end of the home")
        eventually(lambda: not up.processes(), 60, "the end of every process")
        assert worker.wait(10)


def test_another_home_at_its_path_is_left_alone(up: Stack) -> None:
    before = [psutil.Process(pid) for pid in up.pids().values()]
    up.home.rename(up.home.with_name("moved"))
    up.port = free_port()
    up.up()
    eventually(lambda: not any(old.is_running() for old in before), 60, "the end of the old processes")
    eventually(lambda: set(COMPONENTS) <= set(up.pids()), what="all components of the new home")
    assert up.answers()
    assert "was deleted" in (up.home.with_name("moved") / "logs" / "supervisor.log").read_text()


def _ticked(up: Stack) -> bool:
    """True once the supervisor used the processor again: it looks around twice a second."""
    supervisor = psutil.Process(up.pids()["supervisor"])
    before = supervisor.num_ctx_switches().voluntary
    return eventually(lambda: supervisor.num_ctx_switches().voluntary > before + 1, what="a look")
