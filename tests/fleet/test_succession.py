"""Successors from a Slurm whose commands are executables on PATH: one a generation, whatever goes wrong in between."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.errands import ANSWERS, ASKS, RECALL, SERVED, SUCCESSOR
from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings
from edif_hpc.fleet.slurm import names, order, succession
from edif_hpc.fleet.slurm.commands import Slurm, SlurmSilent
from edif_hpc.fleet.slurm.draft import order_for
from edif_hpc.fleet.slurm.errands import Errands
from edif_hpc.fleet.slurm.launcher import SlurmLauncher
from edif_hpc.fleet.slurm.line import Errand, Line
from edif_hpc.fleet.slurm.listing import Listing
from edif_hpc.worker.errands import Supervisor
from tests.support.servers import eventually, redis_server

SETTINGS = '[[pool]]\nname = "main"\ntime = "00:10:00"\nhandover = "{handover}"\n'
SBATCH = """#!{python}
import os, pathlib, re, sys
folder = pathlib.Path({folder!r})
if (folder / "refuse").exists():
    sys.exit("sbatch: error: Batch job submission failed: Invalid account")
text = pathlib.Path(sys.argv[1]).read_text()
(folder / "environment").write_text("\\n".join(sorted(os.environ)))
(folder / "script").write_text(text)
name = re.search(r"--job-name=(\\S+)", text)[1]
with (folder / "submitted").open("a") as submitted:
    submitted.write(name + "\\n")
if not (folder / "slow").exists():
    with (folder / "queue").open("a") as queue:
        queue.write(f"7|PENDING|Priority|N/A|N/A||{{name}}\\n")
if (folder / "mute").exists():
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
print("Submitted batch job 7")
"""
SQUEUE = """#!/bin/sh
[ -e {folder}/silent ] && {{ echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }}
cat {folder}/queue
"""
SCANCEL = """#!/bin/sh
echo $@ >> {folder}/cancelled
"""


@dataclass
class Place:
    """A home, its Redis and a Slurm that does as files in `folder` say."""

    folder: Path
    home: Home
    endpoint: RedisEndpoint

    def order(self, generation: int = 1, handover: str = "overlap") -> order.Order:
        self.home.config.write_text(SETTINGS.format(handover=handover))
        name = names.Name(names.tag(self.home.root), "main", "7c0d12", generation)
        pool = Pool(name="main", time="00:10:00", handover=handover)  # type: ignore[arg-type]  # pydantic checks it
        return order_for(self.home, Settings(), None, pool, name)

    @property
    def submitted(self) -> list[str]:
        path = self.folder / "submitted"
        return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisEndpoint]:
    with redis_server(tmp_path_factory.mktemp("redis")) as found:
        yield found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: RedisEndpoint) -> Place:
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "queue").touch()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": SBATCH, "scancel": SCANCEL}.items():
        (programs / name).write_text(text.format(folder=str(tmp_path), python=sys.executable))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    async def empty() -> None:
        async with endpoint.client() as redis:
            await redis.flushall()

    asyncio.run(empty())
    return Place(tmp_path, Home(tmp_path / "home").create(), endpoint)


def succeed(place: Place, generation: int = 2) -> str:
    return succession.succeed(place.home, place.endpoint, place.order(generation), Slurm(Settings().slurm), "6")


def test_two_who_ask_at_once_submit_one(place: Place) -> None:
    with ThreadPoolExecutor(2) as threads:
        found = set(threads.map(lambda _: succeed(place), range(2)))
    assert len(place.submitted) == 1
    assert found <= {"7", ""}
    assert succeed(place) == "7"


def test_a_taker_that_died_after_sbatch_is_found_by_name(place: Place) -> None:
    name = place.order(2).name.allocation
    (place.folder / "queue").write_text(f"5|PENDING|Priority|N/A|N/A||{name}\n")
    assert succeed(place) == "5"
    assert place.submitted == []


def test_while_slurm_is_silent_nothing_is_submitted_and_the_next_may_try_at_once(place: Place) -> None:
    (place.folder / "silent").touch()
    with pytest.raises(SlurmSilent):
        succeed(place)
    assert place.submitted == []
    (place.folder / "silent").unlink()
    assert succeed(place) == "7"


def test_a_submission_without_an_answer_is_not_repeated_by_others(place: Place) -> None:
    """It may exist, and Slurm may show it late: only the lease's end lets others look."""
    (place.folder / "mute").touch()
    (place.folder / "slow").touch()
    with pytest.raises(ComponentError, match="timed out"):
        succeed(place)
    assert succeed(place) == ""
    assert len(place.submitted) == 1


def test_a_successor_waits_for_its_namesake_and_in_requeue_mode_for_its_predecessor(place: Place) -> None:
    assert succession.dependency_of(place.order(2), "6") == "singleton"
    assert succession.dependency_of(place.order(2, "requeue"), "6") == "afterany:6,singleton"
    succeed(place)
    assert "#SBATCH --dependency=singleton\n" in (place.folder / "script").read_text()


def test_nothing_of_the_predecessors_environment_goes_along(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_CONF", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "1")
    succeed(place)
    seen = [name for name in (place.folder / "environment").read_text().split() if name.startswith(("SLURM", "SBATCH"))]
    assert seen == ["SLURM_CONF"]


# -- the line between a worker and its supervisor -------------------------------------------------------------------


@dataclass
class Watch:
    """A supervisor's half: it polls as the real one does."""

    line: Line
    errands: Errands
    report: order.Report
    counted: list[str]

    def ask(self, worker: Supervisor, verb: str, generation: int) -> str:
        async def both() -> str:
            asking = asyncio.create_task(worker.ask(verb, generation))  # type: ignore[arg-type]  # one of the two
            while not asking.done():
                self.errands.poll(self.line)
                await asyncio.sleep(0.01)
            return asking.result()

        return asyncio.run(both())


@pytest.fixture
def watch(place: Place) -> Iterator[Watch]:
    report = order.Report(job_id="6", host="node1", started=time.time())
    line = Line(place.folder / "line")
    counted: list[str] = []
    errands = Errands(place.order(), Slurm(Settings().slurm, counted.append), report, lambda: None)
    found = Watch(line, errands, report, counted)
    yield found
    found.errands.close()
    line.close()


def test_a_worker_gets_its_successor_through_its_supervisor(place: Place, watch: Watch) -> None:
    worker = Supervisor(place.folder / "line")
    assert watch.ask(worker, SUCCESSOR, 2) == "7"
    assert watch.ask(worker, SUCCESSOR, 2) == "7"
    assert place.submitted == [place.order(2).name.allocation]
    assert watch.report.successor == "7"
    assert watch.ask(worker, RECALL, 2) == ""
    assert (place.folder / "cancelled").read_text().split()[-1] == "7"
    assert watch.report.recalled == "7"
    assert watch.counted == ["squeue", "sbatch", "squeue", "squeue", "scancel"]
    worker.close()


def test_a_worker_that_has_served_is_noted_and_gets_no_answer(place: Place, watch: Watch) -> None:
    worker = Supervisor(place.folder / "line")
    worker.note(SERVED, 1)
    assert watch.ask(worker, RECALL, 2) == ""
    assert watch.report.served
    worker.close()


def test_a_worker_is_told_why_there_is_no_successor(place: Place, watch: Watch) -> None:
    worker = Supervisor(place.folder / "line")
    with pytest.raises(ComponentError, match="no other errand"):
        watch.ask(worker, SUCCESSOR, 9)
    (place.folder / "refuse").touch()
    with pytest.raises(ComponentError, match="Invalid account"):
        watch.ask(worker, SUCCESSOR, 2)
    (place.folder / "refuse").unlink()
    place.home.config.write_text("")
    with pytest.raises(ComponentError, match="no pool main"):
        watch.ask(worker, SUCCESSOR, 2)
    assert place.submitted == []
    worker.close()


def test_the_line_passes_over_what_is_no_errand(watch: Watch) -> None:
    with (watch.line.folder / ASKS).open("w") as pipe:
        pipe.write("rm -rf\nsuccessor two\nsuccessor 2 3\n" + "x" * 9000 + "\nrecall 2\n")
    asked = eventually(lambda: list(watch.line.errands()), 5.0, "an errand")
    assert [(errand.verb, errand.generation) for errand in asked] == [(RECALL, 2)]


def test_an_answer_that_nobody_reads_holds_nobody_up(watch: Watch) -> None:
    for _ in range(100):
        watch.line.answer(Errand(SUCCESSOR, 2), "refused " + "x" * 2000)
    assert (watch.line.folder / ANSWERS).is_fifo()


def test_the_fleet_takes_up_a_successor_that_a_supervisor_reported(place: Place) -> None:
    pool = place.order().pool
    listing = Listing(Slurm(Settings().slurm), place.home.root)

    def draft(name: names.Name) -> order.Order:
        return order_for(place.home, Settings(), None, pool, name)

    def again(what: order.Order, predecessor: str) -> str:
        return succession.succeed(place.home, place.endpoint, what, Slurm(Settings().slurm), predecessor)

    launcher = SlurmLauncher(place.home, pool, listing, draft, again)
    launcher.launched()
    worker = launcher.launch()
    name = next(name for name in launcher._submitted if name.worker == worker)
    report = order.Report(job_id="7", host="node1", started=time.time() - 100, ended=time.time(), status=0)
    report.successor = "8"
    order.write_report(place.home.root, name, report)
    assert [ended.worker_id for ended in launcher.ended()] == [worker]
    assert [each.worker_id for each in launcher.launched()] == [name.next.worker]


def test_the_fleet_continues_a_lineage_that_broke(place: Place) -> None:
    pool = place.order().pool

    def draft(name: names.Name) -> order.Order:
        return order_for(place.home, Settings(), None, pool, name)

    def again(what: order.Order, predecessor: str) -> str:
        return succession.succeed(place.home, place.endpoint, what, Slurm(Settings().slurm), predecessor)

    launcher = SlurmLauncher(place.home, pool, Listing(Slurm(Settings().slurm), place.home.root), draft, again)
    launcher.launched()
    launcher.launch()
    name = next(iter(launcher._submitted))
    started = time.time() - 1000
    report = order.Report(job_id="7", host="node1", started=started, ended=time.time(), status=9, cause="lost")
    report.served, report.longest = True, 900.0
    order.write_report(place.home.root, name, report)
    assert [ended.status for ended in launcher.ended()] == [9]
    assert launcher.launch() == name.next.worker
    assert place.submitted == [name.allocation, name.next.allocation]
    assert again(draft(name.next), "7") == "7", "its worker asks too late"
    assert len(place.submitted) == 2
