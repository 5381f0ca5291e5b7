"""A worker in its lineage: real workers of a real service, and this test in the place of who watches over them."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from nnsight import TransformersModel

from edif_hpc.core.endpoints import RedisEndpoint, Role, redis_endpoint
from edif_hpc.core.lineage import Answer, Lineages
from edif_hpc.core.queue import keys
from edif_hpc.core.registry import Registry, WorkerRecord
from edif_hpc.fleet.slurm.line import Errand, Line
from edif_hpc.worker.agent import is_kept
from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import EDIF_HPC, Stack, client_of, running
from tests.worker.started import prepared

from .reaching import of

pytestmark = pytest.mark.xdist_group("handover")

T = TypeVar("T")
SETTINGS = """
[fleet]
workers = 0
[worker]
threads = 1
heartbeat_seconds = 0.5
"""
WAIT_SECONDS = 60.0
LONG_SECONDS = 3600.0


@pytest.fixture(scope="module")
def service(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    models.offline_client(cache)
    with running(tmp_path_factory.mktemp("handover") / "home", cache, "process", SETTINGS) as found, client_of(found):
        yield found


@dataclass
class Allocation:
    """A worker and its supervisor's half of their line. Every errand is noted, and done as job 77 but for `refused`."""

    service: Stack
    lineage: str
    generation: int
    seconds: float
    job: str = "42"
    refused: str = ""
    errands: list[Errand] = field(default_factory=list)

    def __enter__(self) -> Allocation:
        folder = self.service.home / f"line-{secrets.token_hex(3)}"
        self.line = Line(folder)
        for path in (folder, *folder.iterdir()):
            os.chown(path, self.service.uid or -1, self.service.uid or -1)
        self.started = time.time()
        command = [
            EDIF_HPC, "worker", "--home", self.service.home, "--id", self.worker, "--pool", "main",
            "--deadline", f"{self.started + self.seconds:.0f}", "--lineage", self.lineage,
            "--generation", str(self.generation), "--supervisor", folder,
        ]  # fmt: skip
        identity: dict[str, Any] = (
            {"user": self.service.uid, "group": self.service.uid, "extra_groups": []} if self.service.uid else {}
        )
        self.log = self.service.home / "logs" / f"{self.worker}.log"
        with self.log.open("ab") as words:
            self.process = subprocess.Popen(
                command, env=self.service.environment(SLURM_JOB_ID=self.job), cwd="/", stdout=words, stderr=words,
                **identity,
            )  # fmt: skip
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._serve)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._over.set()
        self._watch.join()
        self.line.close()

    @property
    def worker(self) -> str:
        return f"worker-main-{self.lineage}-g{self.generation}"

    def _serve(self) -> None:
        while not self._over.wait(0.05):
            for errand in self.line.errands():
                self.errands.append(errand)
                if errand.verb == self.refused:
                    self.line.answer(errand, "refused Slurm did not answer.")
                elif errand.verb != "served":
                    self.line.answer(errand, "submitted 77" if errand.verb == "successor" else "done")

    def asked(self) -> list[str]:
        return [errand.verb for errand in self.errands if errand.verb != "served"]

    def serves(self) -> bool:
        return any(row["name"] == self.worker for row in self.service.json("ps"))

    def end(self) -> int:
        """Its status, once it has ended by itself."""
        try:
            return self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.log.read_text()) from None


def in_redis(service: Stack, work: Callable[[Lineages], Any], role: Role = Role.WORKER) -> Any:
    async def run() -> Any:
        async with of(service, redis_endpoint, role).client() as redis:
            return await work(Lineages(redis))

    return asyncio.run(run())


def model() -> Any:
    return TransformersModel(models.repo_id("gpt2"), task="text-generation")


def ask() -> None:
    """A request, which has the model loaded."""
    with model().trace("The Eiffel Tower", remote=True):
        model_answer = 2  # noqa: F841 - the block needs a body


def lineage() -> str:
    return secrets.token_hex(3)


def test_a_signal_suffices(service: Stack) -> None:
    """Slurm's warning at a time that no clock foresaw: the worker asks for a successor, and goes."""
    with Allocation(service, lineage(), 1, LONG_SECONDS) as first:
        ask()
        first.process.send_signal(signal.SIGUSR2)
        assert first.end() == 0
        assert [(errand.verb, errand.generation) for errand in first.errands] == [("served", 1), ("successor", 2)]
        assert in_redis(service, lambda lineages: lineages.job_of(first.lineage, 2)) == "77"


def test_a_worker_that_holds_nothing_asks_for_nobody(service: Stack) -> None:
    with Allocation(service, lineage(), 1, LONG_SECONDS) as first:
        eventually(first.serves, WAIT_SECONDS, "the worker")
        first.process.send_signal(signal.SIGUSR2)
        assert first.end() == 0
        assert first.asked() == []


def test_signals_until_its_last_moment_do_not_make_a_good_end_a_failure(service: Stack) -> None:
    """Slurm warns every process of a step, at a time of its own choice: perhaps of one that is just ending."""
    with Allocation(service, lineage(), 1, LONG_SECONDS) as first:
        eventually(first.serves, WAIT_SECONDS, "the worker")

        def warned_until_gone() -> bool:
            first.process.send_signal(signal.SIGUSR2)
            return first.process.poll() is not None

        eventually(warned_until_gone, WAIT_SECONDS, "the end", pause=0.0)
        assert first.end() == 0


def test_a_superseded_allocation_leaves(service: Stack) -> None:
    name = lineage()
    in_redis(service, lambda lineages: lineages.enter(name, 2, "43"))
    with Allocation(service, name, 1, LONG_SECONDS) as late:
        assert late.end() == 0
        assert "superseded" in late.log.read_text()


def test_who_is_told_to_end_takes_its_successor_back(service: Stack) -> None:
    """A person's scancel, or `pool stop`: the lineage is over."""
    with Allocation(service, lineage(), 1, 40.0) as first:
        ask()
        eventually(first.asked, WAIT_SECONDS, "the clock")
        first.process.send_signal(signal.SIGTERM)
        assert first.end() == 0
        assert first.asked() == ["successor", "recall"]
        intent = in_redis(service, lambda lineages: lineages.take(first.lineage, 3, "fleet"))
        assert intent.answer is Answer.ENDED


def test_a_successor_that_could_not_be_taken_back_finds_its_lineage_ended(service: Stack) -> None:
    with Allocation(service, lineage(), 1, 40.0, refused="recall") as first:
        ask()
        eventually(first.asked, WAIT_SECONDS, "the clock")
        first.process.send_signal(signal.SIGTERM)
        assert first.end() == 0
        with Allocation(service, first.lineage, 2, LONG_SECONDS, job="77") as late:
            assert late.end() == 0
            assert "superseded" in late.log.read_text()


def test_who_is_told_to_end_beside_its_successor_leaves_the_lineage_to_it(service: Stack) -> None:
    name = lineage()
    with Allocation(service, name, 1, LONG_SECONDS) as first:
        eventually(first.serves, WAIT_SECONDS, "the worker")
        in_redis(service, lambda lineages: lineages.enter(name, 2, "77"))
        first.process.send_signal(signal.SIGTERM)
        assert first.end() == 0
        assert in_redis(service, lambda lineages: lineages.take(name, 3, "worker")).answer is Answer.YOURS


def test_a_worker_that_breaks_leaves_its_lineage_to_who_is_started_in_its_place(service: Stack) -> None:
    with Allocation(service, lineage(), 1, LONG_SECONDS) as first:
        eventually(first.serves, WAIT_SECONDS, "the worker")
        # Nothing that a worker expects in this place: one of its loops ends.
        in_redis(service, lambda lineages: lineages.redis.set(keys.control(first.worker), "x"), Role.GATEWAY)
        assert first.end() != 0
        assert in_redis(service, lambda lineages: lineages.take(first.lineage, 2, "worker")).answer is Answer.YOURS


def test_a_successor_that_cannot_hold_the_models_relieves_nobody(service: Stack) -> None:
    name = lineage()
    with Allocation(service, name, 1, 40.0) as first:
        ask()
        eventually(first.asked, WAIT_SECONDS, "the clock")
        row = next(row for row in service.json("status")["workers"] if row["worker_id"] == first.worker)
        failed = [{**each, "state": "failed", "error": "no room"} for each in row["models"]]
        record = WorkerRecord.model_validate({**row, "worker_id": f"worker-main-{name}-g2", "models": failed})
        in_redis(service, lambda lineages: Registry(lineages.redis).announce(record, 60.0))
        eventually(lambda: "cannot hold what is served here" in first.log.read_text(), WAIT_SECONDS, "its words")
        assert first.process.poll() is None
        assert '"draining"' not in first.log.read_text()
        in_redis(service, lambda lineages: Registry(lineages.redis).leave(record.worker_id))


def test_what_cannot_end_in_time_runs_on_the_successor(service: Stack) -> None:
    name = lineage()
    with Allocation(service, name, 1, 30.0) as first:
        ask()
        eventually(first.asked, WAIT_SECONDS, "the clock")
        with model().trace("The Eiffel Tower", remote=True, blocking=False) as tracer:
            time.sleep(20)
            answer = 3  # noqa: F841 - it is the result, by this name
        tracer.backend()
        request = tracer.backend.job_id
        eventually(lambda: service.json("status", request)["status"] == "RUNNING", WAIT_SECONDS, "the run")
        assert first.end() == 0
        assert service.json("status", request)["status"] != "COMPLETED"
        with Allocation(service, name, 2, LONG_SECONDS, job="77") as second:
            eventually(lambda: service.json("status", request)["status"] == "COMPLETED", WAIT_SECONDS, "the end")
            assert request in second.log.read_text()


def test_a_node_that_does_not_reach_redis_says_so_and_ends(tmp_path: Path) -> None:
    home = prepared(tmp_path / "home", RedisEndpoint("redis://127.0.0.1:9/0", "", "test-password"))
    home.config.write_text(home.config.read_text().replace("[worker]", "[worker]\noffline_seconds = 1"))
    line = Line(tmp_path / "line")
    command = [
        EDIF_HPC, "worker", "--home", home.root, "--pool", "main", "--lineage", lineage(), "--supervisor", line.folder,
    ]  # fmt: skip
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "42"}, capture_output=True, text=True, timeout=60.0,
        check=False,
    )  # fmt: skip
    line.close()
    assert done.returncode == 1
    assert "does not reach the service's Redis" in done.stderr.splitlines()[-1]
    assert "network.address" in done.stderr


def test_a_predecessor_and_its_successor_are_kept_as_one() -> None:
    def worker(name: str, lineage: str = "", state: str = "serving", pool: str = "main") -> WorkerRecord:
        return WorkerRecord(
            worker_id=name, version="1", host="h", pid=1, started=0.0, pool=pool, state=state, lineage=lineage
        )

    first, second, other = worker("a-g1", "aa"), worker("a-g2", "aa"), worker("b-g1", "bb")
    elsewhere, leaves = worker("0", pool="else"), worker("0-g1", "00", state="draining")
    everybody = [second, other, first, elsewhere, leaves]
    assert [is_kept(each, everybody, 1) for each in (first, second, other)] == [True, True, False]
    assert [is_kept(each, everybody, 2) for each in (first, second, other)] == [True, True, True]
    alone = [worker("x"), worker("y")]
    assert [is_kept(each, alone, 1) for each in alone] == [True, False]
