"""A fleet as a process, beside a real Redis and a Slurm of executables that refuses, fails or hangs."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis.asyncio import Redis

from edif_hpc.core.endpoints import RedisEndpoint, store_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.lineage import Lineages
from edif_hpc.core.queue import Queue, Submission, keys
from edif_hpc.core.registry import WorkerRecord
from edif_hpc.core.settings import LimitSettings
from edif_hpc.core.store import Store
from edif_hpc.fleet import brake
from edif_hpc.fleet.fleet import Fleet
from edif_hpc.fleet.health import Health, read_health, write_health
from edif_hpc.fleet.notices import Alerts
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.commands import Slurm
from edif_hpc.fleet.slurm.draft import order_for
from edif_hpc.fleet.slurm.launcher import SlurmLauncher
from edif_hpc.fleet.slurm.listing import ASK_EVERY_SECONDS, Listing, forget_kept
from edif_hpc.fleet.state import settings_of
from tests.support.servers import eventually, redis_server
from tests.worker.started import prepared

T = TypeVar("T")
SETTINGS = """
[fleet]
tick_seconds = 0.2
backoff_seconds = [600, 600]
[[pool]]
name = "bad"
partition = "nowhere"
min_workers = 1
[[pool]]
name = "good"
min_workers = 1
"""
SQUEUE = """#!/bin/sh
echo asked >> {folder}/asked
while [ -e {folder}/hangs ]; do sleep 0.2; done
cat {folder}/queue
"""
SBATCH = """#!{python}
import pathlib, re, sys, time
folder = pathlib.Path({folder!r})
script = pathlib.Path(sys.argv[1]).read_text()
name = re.search(r"--job-name=(\\S+)", script)[1]
with (folder / "submitted").open("a") as submitted:
    submitted.write(name + "\\n")
while "nowhere" in script and (folder / "stuck").exists():
    time.sleep(0.2)
if "nowhere" in script:
    sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
with (folder / "queue").open("a") as queue:
    queue.write(f"7|PENDING|Priority|N/A|N/A||{{name}}\\n")
print("Submitted batch job 7")
"""
SCANCEL = """#!/bin/sh
echo $@ >> {folder}/cancelled
exit 1
"""
SILENT_SECONDS = 3.0
"""Some looks of the fleet's, in which nothing is to happen."""


@dataclass
class Site:
    folder: Path
    home: Home
    redis: RedisEndpoint

    @contextmanager
    def fleet(self) -> Iterator[subprocess.Popen[bytes]]:
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.home.root)}
        command = [sys.executable, "-m", "edif_hpc.cli", "fleet", "--home", str(self.home.root)]
        with (self.home.logs / "fleet.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/")
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def fleet_here(self, redis: Redis, now: Callable[[], float]) -> Fleet:
        """A fleet in this process, whose questions to Slurm go by a clock of the test's."""
        settings = settings_of(self.home, None).settings
        found = {
            pool.name: SlurmLauncher(
                self.home,
                pool,
                Listing(Slurm(settings.slurm), self.home.root, now),
                lambda name, pool=pool: order_for(self.home, settings, None, pool, name),
                lambda what, predecessor: None,
            )
            for pool in settings.pool
        }
        store = Store(store_endpoint(self.home, settings))
        return Fleet(settings, redis, store, settings.pool, dict(found), Alerts("", "home"))

    def ask(self, work: Callable[[Any], Awaitable[T]]) -> T:
        async def run() -> T:
            async with self.redis.client() as redis:
                return await work(redis)

        return asyncio.run(run())

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edif_hpc.cli", *arguments, "--home", str(self.home.root)]
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.home.root), "COLUMNS": "300"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")

    def pool(self, name: str) -> dict[str, Any]:
        rows = json.loads(self.cli("pool", "list", "--json").stdout)
        return next(row for row in rows if row["name"] == name)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def submitted(self, pool: str) -> int:
        return sum(f"-{pool}-" in line for line in self.lines("submitted"))

    def notice(self, pool: str) -> str:
        return (self.ask(lambda redis: redis.hget(keys.NOTICES, f"pool:{pool}")) or b"").decode()

    def events(self, request_id: str) -> str:
        found = self.ask(lambda redis: redis.xrange(keys.events(request_id)))
        return "\n".join(fields[b"description"].decode() for _, fields in found)

    def let_ask_anew(self) -> None:
        """The next fleet need not wait for the minute's end."""
        forget_kept(self.home.root)

    def health(self, pool: str) -> Health:
        return self.ask(read_health).get(pool, Health())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "queue").touch()
    (tmp_path / "redis").mkdir()
    for name, text in {"squeue": SQUEUE, "sbatch": SBATCH, "srun": SBATCH, "scancel": SCANCEL}.items():
        program = tmp_path / "bin" / name
        program.write_text(text.format(folder=str(tmp_path), python=sys.executable))
        program.chmod(0o755)
    with redis_server(tmp_path / "redis") as redis:
        home = prepared(tmp_path / "home", redis)
        home.config.write_text(home.config.read_text() + SETTINGS)
        yield Site(tmp_path, home, redis)
    for name in ("hangs", "stuck"):
        (tmp_path / name).unlink(missing_ok=True)


def test_a_pool_that_slurm_refuses_keeps_no_other_from_starting_and_says_why(site: Site) -> None:
    with site.fleet():
        eventually(lambda: site.submitted("good") == 1, 30.0, "the good pool's allocation")
        assert "Invalid partition" in eventually(lambda: site.notice("bad"), 10.0, "a notice")
        assert site.submitted("bad") == 1
        assert site.health("good").deaths == 0


def test_pools_and_allocations_show_what_waits_what_is_paused_and_how_it_ended(site: Site) -> None:
    with site.fleet():
        eventually(lambda: site.submitted("good") == 1, 30.0, "an allocation")
        eventually(lambda: site.health("bad").deaths == 1, 30.0, "a refusal")
    site.let_ask_anew()
    paused = Health(deaths=9, last_death=time.time(), cause="Invalid partition")
    site.ask(lambda redis: write_health(redis, "bad", paused))
    with site.fleet():
        eventually(lambda: site.health("good").pending == "Priority", 30.0, "what waits")
        good, bad = site.pool("good"), site.pool("bad")
        assert (good["workers"], good["launched"], good["pending"]) == (0, 1, "Priority")
        assert (good["state"], bad["state"], bad["paused"]) == ("waits (Priority)", "paused", True)
        refused = site.cli("pool", "start", "good")
        assert refused.returncode == 1
        assert "has 1, those that wait for Slurm included" in refused.stderr
        (submitted,) = [line for line in site.lines("submitted") if "-good-" in line]
        name = names.read(submitted, site.home.root)
        assert name
        order.write_report(
            site.home.root,
            name,
            order.Report(job_id="7", host="n", started=1.0, restarts=2, status=3, cause="no image"),
        )
        (row,) = json.loads(site.cli("allocations", "--json").stdout)
        assert (row["restarts"], row["exit"], row["cause"]) == (2, 3, "no image")
        assert "no image" in site.cli("allocations").stdout


def test_a_persons_scancel_holds_the_pool_and_drains_nobody(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{site.folder}/bin:/usr/bin:/bin")
    first, second = (names.first(site.home.root, "good") for _ in range(2))
    when = "2026-11-24T04:52:14"

    def rows(state: str) -> str:
        states = {first: state, second: "RUNNING"}
        return "".join(f"7|{each}|None|{when}|{when}|n1|{name.allocation}\n" for name, each in states.items())

    async def told(redis: Redis) -> list[list[str]]:
        clock = [time.time()]
        fleet = site.fleet_here(redis, lambda: clock[0])
        assert await fleet.leads()
        for name in (first, second):
            record = WorkerRecord(
                worker_id=name.worker, pool="good", version="1", host="h", pid=1, started=1.0, state="serving"
            )
            await fleet.registry.announce(record, 60.0)
        for state in ("RUNNING", "CANCELLED"):
            (site.folder / "queue").write_text(rows(state))
            await fleet.tick()
            clock[0] += ASK_EVERY_SECONDS
        assert await brake.held(redis) == {"good"}
        assert await brake.stopped(redis) == set()
        await fleet.tick()
        await fleet.tick()
        assert site.submitted("good") == 0, "nothing in its place, though one is to be kept"
        return [await fleet.registry.commands(name.worker) for name in (first, second)]

    assert site.ask(told) == [[], []]
    assert site.pool("good")["state"] == "held"
    assert "edif-hpc pool resume good" in site.notice("good")


def test_while_a_submission_hangs_other_pools_start_and_who_waits_hears_of_it(site: Site) -> None:
    (site.folder / "stuck").touch()
    with site.fleet():
        eventually(lambda: site.submitted("bad") and site.submitted("good"), 30.0, "both pools' submissions")
        site.ask(lambda redis: Queue(redis, LimitSettings()).submit(Submission("r1", "ann", "m", "trace", {}, b"x")))
        eventually(lambda: "A worker is starting." in site.events("r1"), 30.0, "what its waiting is for")
        assert site.submitted("bad") == 1
        (site.folder / "stuck").unlink()
        assert "Invalid partition" in eventually(lambda: site.notice("bad"), 30.0, "the refusal")


def test_a_fleet_that_is_started_again_keeps_to_the_back_off(site: Site) -> None:
    with site.fleet():
        eventually(lambda: site.health("bad").deaths == 1, 30.0, "the refusal")
        eventually(lambda: site.submitted("good") == 1, 30.0, "the good pool's allocation")
    site.let_ask_anew()
    (site.folder / "queue").write_text("")
    with site.fleet():
        eventually(lambda: site.submitted("good") == 2, 30.0, "a fleet that launches")
        still(lambda: site.submitted("bad") == 1)
        assert site.health("bad").deaths == 1


def test_fleets_that_are_killed_while_slurm_hangs_ask_once_in_all(site: Site) -> None:
    (site.folder / "hangs").touch()
    for _ in range(3):
        with site.fleet():
            told = "Slurm" if not site.lines("asked") else "asked Slurm within the last minute"
            eventually(
                lambda told=told: told in site.notice("good") and site.lines("asked"), 30.0, "why nothing starts"
            )
            site.ask(lambda redis: redis.delete(keys.NOTICES, keys.FLEET_LEADER))
    assert len(site.lines("asked")) == 1


def test_a_stopped_pool_whose_allocation_cannot_be_taken_back_ends_no_fleet(site: Site) -> None:
    (site.folder / "queue").write_text("")
    with site.fleet():
        eventually(lambda: site.submitted("good") == 1, 30.0, "an allocation")
    site.let_ask_anew()
    with site.fleet() as fleet:
        eventually(lambda: site.health("good").pending == "Priority", 30.0, "what waits")
        site.ask(lambda redis: brake.stop(redis, "good"))
        eventually(lambda: site.lines("cancelled"), 30.0, "its cancelling")
        still(lambda: len(site.lines("cancelled")) == 1 and fleet.poll() is None)


@pytest.mark.parametrize(("ended", "held"), [("idle for 600 s", set()), ("", {"good"})])
def test_what_an_ending_lineage_takes_back_is_no_persons_scancel(
    site: Site, monkeypatch: pytest.MonkeyPatch, ended: str, held: set[str]
) -> None:
    """A successor of a template's: nobody but the lineage tells who took it back."""
    name = names.Name(names.tag(site.home.root), "good", "7c0d12", 2).allocation
    monkeypatch.setenv("PATH", f"{site.folder}/bin:/usr/bin:/bin")
    when = "2026-11-24T04:52:14"

    async def look_twice(redis: Redis) -> set[str]:
        clock = [time.time()]
        fleet = site.fleet_here(redis, lambda: clock[0])
        assert await fleet.leads()
        (site.folder / "queue").write_text(f"9|PENDING|Priority|N/A|N/A||{name}\n")
        await fleet.tick()
        assert (await read_health(redis))["good"].pending == "Priority"
        if ended:
            await Lineages(redis).end("7c0d12", 1, ended)
        (site.folder / "queue").write_text(f"9|CANCELLED|Priority|{when}|{when}||{name}\n")
        clock[0] += ASK_EVERY_SECONDS
        await fleet.tick()
        return await brake.held(redis)

    assert site.ask(look_twice) == held


def test_while_slurm_hangs_requests_of_the_dead_come_back(site: Site) -> None:
    (site.folder / "hangs").touch()
    with site.fleet():
        eventually(lambda: site.lines("asked"), 30.0, "the question that hangs")
        site.ask(lose)
        eventually(lambda: "stopped answering" in site.events("r1"), 40.0, "the request's return")
        assert "until Slurm answers" in eventually(lambda: site.notice("good"), 20.0, "the reason")


def test_while_the_store_hangs_requests_of_the_dead_come_back(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(30.0)
        port = mute.getsockname()[1]
        site.home.config.write_text(site.home.config.read_text().replace("127.0.0.1:9", f"127.0.0.1:{port}"))

        def is_due(redis: Any) -> Awaitable[int]:
            return redis.zadd(keys.OBJECTS, {"results/r0/1-x": 1})  # type: ignore[no-any-return]

        site.ask(is_due)
        with site.fleet():
            connection, _ = mute.accept()
            with connection:  # the question that hangs
                site.ask(lose)
                eventually(lambda: "stopped answering" in site.events("r1"), 40.0, "the request's return")


async def lose(redis: Redis) -> None:
    """Have a worker take a request and die."""
    queue = Queue(redis, LimitSettings())
    await queue.submit(Submission("r1", "ann", "model", "trace", {}, b"payload"))
    assert await queue.claim("worker-dead", ["model"], 0.1)


def still(condition: Callable[[], bool]) -> None:
    """It holds now and goes on to."""
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        assert condition()
        time.sleep(0.1)  # nothing tells that nothing happens
