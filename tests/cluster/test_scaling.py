"""How many allocations there are: one for each generation, none when nobody asks, never more than a pool may have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.draft import order_for
from edif_hpc.fleet.state import settings_of
from tests.support import models
from tests.support.models import REPO
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .site import Site
from .stream import ENDED, stream_of

pytestmark = [*CLUSTER, pytest.mark.long]

ROUNDS = 100
HELD = '[[pool]]\nname = "main"\ntime = "00:10:00"\nmax_workers = 0\noptions = ["--hold"]\n'
IDLE_SECONDS = 15.0
MOST = 3
SCALED = f"""[[pool]]
name = "main"
cpus = 1
time = "00:20:00"
max_workers = {MOST}
idle_seconds = {IDLE_SECONDS}
"""
REQUESTS, REQUEST_SECONDS = 60, 2.0
SCALE_SECONDS = 300.0


@contextmanager
def asker(site: Site, path: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.cluster.asker", str(path), how]
    with subprocess.Popen(
        command, cwd=REPO, env=site.cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        **site.cluster.identity,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin
        process.stdin.close()


def ask(process: subprocess.Popen[str], generation: int) -> None:
    assert process.stdin
    process.stdin.write(f"{generation}\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_two_who_ask_for_a_successor_get_one(cluster: Cluster, cache: Path) -> None:
    """Two askers race for one successor, a hundred times: each generation is one allocation."""
    with sites.running(cluster, cache, HELD) as site:
        home = Home(site.home)
        name = names.Name(names.tag(home.root), "main", "7c0d12", 1)
        pool = Pool(name="main", time="00:10:00", max_workers=0, options=["--hold"])
        path = order.write_order(home, order_for(home, settings_of(home, None).settings, None, pool, name))
        for written in (path, path.parent):
            os.chown(written, cluster.uid, cluster.gid)
        got = []
        with asker(site, path, "worker") as worker, asker(site, path, "alone") as alone:
            for generation in range(2, ROUNDS + 2):
                ask(worker, generation)
                ask(alone, generation)
                got.append({answer(worker), answer(alone)} - {"-"})
        assert [each for each in got if len(each) != 1] == []
        submitted = Counter(row["generation"] for row in site.json("allocations"))
        assert submitted == Counter(range(2, ROUNDS + 2))
        jobs = {row["generation"]: {row["job"]} for row in site.json("allocations")}
        assert [jobs[generation] for generation in sorted(jobs)] == got


def test_a_pool_goes_from_nothing_to_its_most_and_back(cluster: Cluster, cache: Path) -> None:
    """Scale from zero, to max_workers, back to zero when nobody asks any more."""
    with sites.running(cluster, cache, SCALED) as site, client_of(Stack(site.home, site.url, site.key)):
        stream = stream_of(site, {"main": models.repo_id("gpt2")})
        assert cluster.jobs() == []
        for _ in range(REQUESTS):
            stream.hold("main", REQUEST_SECONDS)
        seen: set[int] = set()

        def served() -> bool:
            seen.add(len(cluster.jobs()))
            stream.collect()
            return not stream.open

        cluster.wait(served, SCALE_SECONDS, "all answers")
        assert max(seen) == MOST
        cluster.wait(lambda: cluster.jobs() == [], IDLE_SECONDS + 60.0, "an empty queue")
        stream.assert_served_once()
        logs = [path.read_text() for path in (site.home / "logs").glob("worker-main-*.log")]
        assert [ENDED in log for log in logs] == [True] * MOST
