"""Handovers on a real Slurm: two-minute allocations, and a service that does not notice their ends.

The workers run in the CPU image. One stream of requests for two pools side by side: one with SmolLM2, whose successors
start beside their predecessors, and one with a tiny Llama, whose successors start after them. During one handover
neither gateway nor fleet is there, during another Redis is killed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from edif_hpc.fleet.demo_model import REPO_ID
from tests.support import models
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .site import Site
from .stream import DRAINING, READY, SUBMITTED, reached, stream_of, words

pytestmark = CLUSTER

OVER, AFTER = REPO_ID, models.repo_id("llama")
"""The models of the two pools, which are named `over` and `after`."""
POOLS = f"""
[[pool]]
name = "over"
image = "{{image}}"
cpus = 1
time = "00:02:00"
models = ["{OVER}"]

[[pool]]
name = "after"
image = "{{image}}"
cpus = 1
time = "00:02:00"
handover = "requeue"
models = ["{AFTER}"]
"""
HANDOVER_SECONDS = 180.0
"""An allocation's whole time, and what a slow machine takes to bring up the next."""
WELL = frozenset({"running", "pending", "completing", "completed"})
"""The states of allocations that go, or went, as they should."""


def kill(site: Site, *names: str) -> None:
    rows = {row["name"]: row for row in site.json("ps")}
    for name in names:
        os.kill(rows[name]["pid"], signal.SIGKILL)


def test_a_service_outlives_its_allocations(slurm: Cluster, cache: Path, image: Path) -> None:
    slurm.restore()
    pools = POOLS.format(image=image)
    with sites.running(slurm, cache, pools) as site, client_of(Stack(site.home, site.url, site.key)):
        stream = stream_of(site, {"over": OVER, "after": AFTER})
        stream.until(reached(site, "over", READY, 2), HANDOVER_SECONDS, "a successor beside its predecessor")
        stream.until(reached(site, "after", READY, 2), HANDOVER_SECONDS, "a successor after its predecessor")

        # Without gateway and fleet: what was accepted is served, and the lineage goes on.
        stream.until(reached(site, "over", SUBMITTED, 2), HANDOVER_SECONDS, "the second handover")
        stream.ask()
        kill(site, "supervisor", "gateway", "fleet")
        slurm.wait(reached(site, "over", DRAINING, 2), HANDOVER_SECONDS, "a handover without gateway and fleet")
        slurm.wait(reached(site, "after", READY, 3), HANDOVER_SECONDS, "the other pool's")
        site.cli("up", "--detach")

        stream.until(reached(site, "over", SUBMITTED, 3), HANDOVER_SECONDS, "the third handover")
        stream.ask()
        kill(site, "redis")
        slurm.wait(reached(site, "over", DRAINING, 3), HANDOVER_SECONDS, "a handover that lost Redis")
        stream.until(lambda: len(stream.open) <= 2, HANDOVER_SECONDS, "a service as before")
        stream.finish()

        stream.assert_served_once()
        _in_order(site)
        _one_each(site)


def _in_order(site: Site) -> None:
    """In overlap mode a successor is ready before its predecessor drains, at every handover."""
    ready = {word.generation: word.at for word in words(site, "over", READY)}
    drained = {word.generation: word.at for word in words(site, "over", DRAINING)}
    handovers = [number for number in drained if number + 1 in ready]
    assert len(handovers) >= 3
    assert all(ready[number + 1] < drained[number] for number in handovers)


def _one_each(site: Site) -> None:
    """Each pool had one lineage, each generation was one allocation, and none was ended by Slurm or broke."""
    rows = site.json("allocations")
    generations = [(row["pool"], row["lineage"], row["generation"]) for row in rows]
    assert len(generations) == len(set(generations))
    assert len({row["lineage"] for row in rows}) == 2, rows
    assert [_with_report(site, row) for row in rows if row["state"] not in WELL] == []


def _with_report(site: Site, row: dict[str, Any]) -> dict[str, Any]:
    """What Slurm says of an allocation, and what its supervisor did."""
    found = (site.home / "allocations").glob(f"*{row['lineage']}*g{row['generation']}.report.json")
    return {**row, "report": [path.read_text() for path in found]}
