"""A supervisor as a batch step runs it: its own process, signals from outside, and a program in apptainer's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.draft import order_for
from tests.support.servers import eventually

SUPERVISE = """
import sys
from edif_hpc.fleet.slurm import supervisor
for given in sys.argv[2:]:
    name, value = given.split("=")
    setattr(supervisor, name, eval(value))
supervisor.supervise(sys.argv[1])
"""
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
DEAF = """#!{python}
import pathlib, signal
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
pathlib.Path({folder!r}, "worker").touch()
while True:
    signal.pause()
"""
"""It uploads still, whatever it is told."""
CRASHING = """#!{python}
import pathlib, sys
scratch = next(part for part in sys.argv if part.endswith(":/tmp")).removesuffix(":/tmp")
if pathlib.Path({folder!r}, "serves").exists():
    pathlib.Path(scratch, "supervisor", "asks").write_text("served 1\\n")
    __import__("time").sleep(0.5)
sys.exit("it broke")
"""
"""It breaks, after having served or before."""


class Step:
    """A supervisor of one allocation."""

    def __init__(self, folder: Path, program: str = APPTAINER, left: float = 3600.0, **changed: object) -> None:
        """`left` is what remains of the walltime, `changed` constants of the supervisor's."""
        self.folder = folder
        self.home = Home(folder / "home").create()
        self.home.config.write_text('[[pool]]\nname = "main"\nimage = "/worker.sif"\n')
        programs = folder / "bin"
        programs.mkdir()
        (programs / "apptainer").write_text(program.format(python=sys.executable, folder=str(folder)))
        (programs / "apptainer").chmod(0o755)
        self.name = names.Name(names.tag(self.home.root), "main", "7c0d12", 1)
        pool = Pool(name="main", image="/worker.sif")
        path = order.write_order(self.home, order_for(self.home, Settings(), None, pool, self.name))
        environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
        self.deadline = int(time.time() + left)
        environment["SLURM_JOB_END_TIME"] = str(self.deadline)  # so that it need not ask Slurm
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISE, path, *(f"{name}={value}" for name, value in changed.items())],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def report(self) -> order.Report | None:
        return order.read_report(self.home.root, self.name)

    def serves(self) -> bool:
        return (self.folder / "worker").exists()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running(folder: Path, program: str, left: float = 3600.0, **changed: object) -> Iterator[Step]:
    found = Step(folder, program, left, **changed)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Step]:
    with running(tmp_path, APPTAINER) as found:
        yield found


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


def test_who_uploads_still_when_the_walltime_ends_has_until_its_last_seconds(tmp_path: Path) -> None:
    with running(tmp_path, DEAF, left=8.0, LAST_SECONDS=4.0) as step:
        eventually(step.serves, what="the worker")
        step.process.send_signal(signal.SIGUSR2)
        step.process.wait(20)
        report = step.report()
        assert report is not None
        assert report.ended is not None
        assert step.deadline - 4 <= report.ended < step.deadline
        assert report.cause == "killed by signal 9"


def test_who_is_told_to_end_without_a_reason_has_its_time_and_no_more(tmp_path: Path) -> None:
    with running(tmp_path, DEAF, END_SECONDS=1.0) as step:
        eventually(step.serves, what="the worker")
        step.process.send_signal(signal.SIGTERM)
        step.process.wait(20)
        report = step.report()
        assert report is not None
        assert report.cause == "killed by signal 9"


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_only_who_served_and_lived_long_gets_a_successor(tmp_path: Path, served: bool, old: bool) -> None:
    """However long its workers were started again and again: else one crash would be a chain of allocations."""
    if served:
        (tmp_path / "serves").touch()
    with running(tmp_path, CRASHING, PAUSES="(0.5,)", YOUNG_SECONDS=0.0 if old else 60.0) as step:
        assert step.process.wait(30) == 1
        report = step.report()
        assert report is not None
        assert (report.served, report.restarts, report.cause) == (served, 1, "it broke")
        assert 0 < report.longest < 10
        # There is no Redis here to ask for the right to submit, and it says so.
        assert ("no successor" in step.log.read_text()) == (served and old)
