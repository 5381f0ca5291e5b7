"""The supervisor of an allocation is killed between its sbatch and the record of it, with forty requests in flight.

Its worker goes down with it. What it had submitted is there, nobody but Slurm knows of it, and whoever looks next must
not submit another.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from tests.faults.flight import Flight, packed
from tests.faults.scene import reference
from tests.stock import support
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .site import Site
from .stream import READY, reached

pytestmark = CLUSTER

SETTINGS = """
[slurm]
sbatch = "{sbatch}"
[limits]
inline_bytes = 65536
[[pool]]
name = "main"
cpus = 1
time = "00:02:00"
"""
SBATCH = """#!/bin/bash
sbatch "$@"
status=$?
while [ -e {hold} ]; do sleep 0.1; done
exit $status
"""
START_SECONDS = 120.0
SUBMIT_SECONDS = 150.0
"""A successor is asked for within the allocation's two minutes."""
SERVE_SECONDS = 300.0


def test_killed_between_sbatch_and_its_record(cluster: Cluster, cache: Path) -> None:
    folder = cluster.home / "slow-sbatch"
    folder.mkdir()
    hold, sbatch = folder / "hold", folder / "sbatch"
    sbatch.write_text(SBATCH.format(hold=hold))
    sbatch.chmod(0o755)
    pools = SETTINGS.format(sbatch=sbatch)
    with sites.running(cluster, cache, pools) as site, client_of(Stack(site.home, site.url, site.key)):
        stack = Stack(site.home, site.url, site.key, uid=cluster.uid)
        gate = site.home / "gate"
        flight = Flight(stack, packed(support.tiny(), gate, reference()), gate)
        cluster.wait(reached(site, "main", READY, 1), START_SECONDS, "the first worker")
        hold.touch()
        waiting = cluster.wait(lambda: submitting(sbatch), SUBMIT_SECONDS, "the supervisor's sbatch")
        cluster.wait(lambda: len(generations(cluster)) == 2, SUBMIT_SECONDS, "the successor in Slurm's queue")
        flight.when("RUNNING")
        os.kill(waiting.ppid(), signal.SIGKILL)
        hold.unlink()
        flight.land(SERVE_SECONDS)
        found = sorted(row["generation"] for row in rows(site))
        assert found == list(range(1, len(found) + 1)), "a generation is one allocation"  # the second may have its own
        assert len(found) >= 2


def submitting(sbatch: Path) -> psutil.Process | None:
    """The `timeout` around a running sbatch: a child of whoever submits."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(sbatch) in command and Path(command[0]).name == "timeout":
            return process
    return None


def generations(cluster: Cluster) -> set[str]:
    return {job.name for job in cluster.jobs()}


def rows(site: Site) -> list[dict[str, int]]:
    found: list[dict[str, int]] = site.json("allocations")
    return found
