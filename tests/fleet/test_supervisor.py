"""A supervisor as a batch step runs it: its own process, signals from outside, and a program in apptainer's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.draft import order_for
from tests.support.servers import eventually

SUPERVISE = "import sys; from edif_hpc.fleet.slurm.supervisor import supervise; supervise(sys.argv[1])"
APPTAINER = """#!{python}
import os, pathlib, signal, sys
def end(number, _):
    signal.signal(number, signal.SIG_IGN)
    os._exit(0)
signal.signal(signal.SIGUSR2, end)
pathlib.Path({folder!r}, "worker").touch()
while True:
    signal.pause()
"""
"""In the place of a worker: it ends in good order when it is warned of the walltime's end."""


class Step:
    """A supervisor of one allocation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / "home").create()
        self.home.config.write_text('[[pool]]\nname = "main"\nimage = "/worker.sif"\n')
        programs = folder / "bin"
        programs.mkdir()
        (programs / "apptainer").write_text(APPTAINER.format(python=sys.executable, folder=str(folder)))
        (programs / "apptainer").chmod(0o755)
        self.name = names.Name(names.tag(self.home.root), "main", "7c0d12", 1)
        pool = Pool(name="main", image="/worker.sif")
        path = order.write_order(self.home, order_for(self.home, Settings(), None, pool, self.name))
        environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
        environment["SLURM_JOB_END_TIME"] = "4102444800"  # a time far away, so that it need not ask Slurm
        self.process = subprocess.Popen([sys.executable, "-c", SUPERVISE, path], env=environment)

    def report(self) -> order.Report | None:
        return order.read_report(self.home.root, self.name)

    def serves(self) -> bool:
        return (self.folder / "worker").exists()


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Step]:
    found = Step(tmp_path)
    yield found
    found.process.kill()
    found.process.wait()


def test_signals_until_its_last_moment_do_not_make_a_good_end_a_failure(step: Step) -> None:
    """Slurm warns every process of a step, at a time of its own choice: perhaps of one that is just ending."""
    eventually(step.serves, what="the worker")

    def warned_until_gone() -> bool:
        step.process.send_signal(signal.SIGUSR2)
        return step.process.poll() is not None

    eventually(warned_until_gone, what="the end", pause=0.0)
    assert step.process.returncode == 0
    report = step.report()
    assert report is not None
    assert report.status == 0
