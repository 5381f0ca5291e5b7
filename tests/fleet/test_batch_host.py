"""Fleet, command line and supervisor beside a Slurm of executables: what they count, and what they leave behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.home import Home
from edif_hpc.core.settings import load
from edif_hpc.core.tally import slurm_commands
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.draft import order_for
from tests.support.servers import eventually, redis_server
from tests.worker.started import prepared

SQUEUE = "#!/bin/sh\necho '7|RUNNING|None|2026-11-24T04:00:00|2099-11-24T04:10:00|node1|interactive'\n"
POOL = '[[pool]]\nname = "main"\ntime = "00:10:00"\nimage = "/nowhere.sif"\n'
HOLD = """
import os, pathlib, signal, sys
from edif_hpc.core.scratch import scratch
with scratch(pathlib.Path(sys.argv[1]), "edif-hpc-", "6-") as folder:
    (folder / "weights").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisEndpoint]:
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis") as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, redis: RedisEndpoint) -> Home:
    """A home with a pool of allocations, and a `squeue` that answers."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(SQUEUE)
    (programs / "squeue").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    found = prepared(tmp_path / "home", redis)
    found.config.write_text(found.config.read_text() + POOL)
    return found


def total(redis: RedisEndpoint) -> dict[str, int]:
    async def ask() -> dict[str, int]:
        async with redis.client() as client:
            return (await slurm_commands(client))["total"]

    return asyncio.run(ask())


def started(home: Home, *command: str) -> subprocess.Popen[bytes]:
    """A process in an allocation's environment that finds our `squeue`, and no container runtime."""
    beside = home.root.parent
    environment = {
        "PATH": str(beside / "bin"), "HOME": str(home.root), "TMPDIR": str(beside / "tmp"), "SLURM_JOB_ID": "7",
    }  # fmt: skip
    with (home.logs / "started.log").open("ab") as log:
        return subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log, cwd="/")


def supervised(home: Home) -> order.Report:
    """How an allocation goes whose supervisor asks when it ends, finds no container runtime and gives up."""
    settings = load(home.config).settings
    told = order_for(home, settings, None, settings.pool[0], names.first(home.root, "main"))
    path = order.write_order(home, told)
    code = f"from edif_hpc.fleet.slurm.supervisor import supervise; supervise({str(path)!r})"
    assert started(home, "-c", code).wait(60) == 1
    report = order.read_report(home.root, told.name)
    assert report
    return report


def test_the_fleet_counts(home: Home, redis: RedisEndpoint) -> None:
    fleet = started(home, "-m", "edif_hpc.cli", "fleet", "--home", str(home.root))
    try:
        eventually(lambda: total(redis) == {"squeue": 1}, 60.0, "the fleet's question")
    finally:
        fleet.terminate()
        assert fleet.wait(60) == 0


def test_the_command_line_counts(home: Home, redis: RedisEndpoint) -> None:
    assert started(home, "-m", "edif_hpc.cli", "allocations", "--home", str(home.root)).wait(60) == 0
    assert total(redis) == {"squeue": 1}


def test_a_supervisor_on_a_batch_host_counts(home: Home, redis: RedisEndpoint) -> None:
    assert "apptainer could not be started" in supervised(home).cause
    assert total(redis) == {"squeue": 1}


def test_the_next_supervisor_removes_what_a_killed_one_left(home: Home) -> None:
    temporary = home.root.parent / "tmp"
    assert started(home, "-c", HOLD, str(temporary)).wait(60) < 0
    assert [path.name for path in temporary.rglob("weights")] == ["weights"]
    supervised(home)
    assert not list(temporary.iterdir())
