"""Handovers on a real Slurm: two-minute allocations, and a service that does not notice their ends.

One stream of requests for two pools side by side: one whose successors start beside their predecessors, one whose
successors start after them. During one handover neither gateway nor fleet is there, during another Redis is killed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling.transformers import TransformersModel

from tests.support import models
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .site import Site

pytestmark = CLUSTER

OVER, AFTER = "gpt2", "llama"
"""The models of the two pools, which are named `over` and `after`."""
POOLS = f"""
[[pool]]
name = "over"
cpus = 1
time = "00:02:00"
models = ["{models.repo_id(OVER)}"]

[[pool]]
name = "after"
cpus = 1
time = "00:02:00"
handover = "requeue"
models = ["{models.repo_id(AFTER)}"]
"""
PROMPT = "The Eiffel Tower is located in the city of"
GAP_SECONDS = 1.0
HANDOVER_SECONDS = 180.0
"""An allocation's whole time, and what a slow machine takes to bring up the next."""
ANSWER_SECONDS = 90.0
WELL = frozenset({"running", "pending", "completing", "completed"})
"""The states of allocations that go, or went, as they should."""
READY, DRAINING, SUBMITTED = "READY", "draining", "successor submitted"


@pytest.fixture(scope="module")
def cache(slurm: Cluster) -> Path:
    found = models.build_cache(models.test_cache() / "cluster", [OVER, AFTER])
    for path in (found, *found.rglob("*")):  # the service is another user's
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    models.offline_client(found)
    return found


@dataclass
class Stream:
    """Requests for both pools, and what became of them."""

    site: Site
    models: dict[str, TransformersModel]
    expected: dict[str, torch.Tensor]
    open: dict[str, tuple[str, Any]] = field(default_factory=dict)
    served: dict[str, list[str]] = field(default_factory=lambda: {"over": [], "after": []})

    def ask(self) -> None:
        for pool, model in self.models.items():
            try:
                with model.trace(PROMPT, remote=True, blocking=False) as tracer:
                    logits = model.output.logits.save()  # noqa: F841 - it is the result, by this name
            except RemoteError as error:
                if "cannot reach its Redis" not in str(error):
                    raise
                continue  # it was not accepted
            self.open[tracer.backend.job_id] = (pool, tracer.backend)

    def collect(self) -> None:
        for request, (pool, backend) in list(self.open.items()):
            try:
                found = backend()
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 503:
                    raise
                return
            if found is not None:
                assert torch.equal(found["logits"], self.expected[pool]), pool
                self.served[pool].append(request)
                del self.open[request]

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Go on asking until something has happened."""

        def happened() -> bool:
            self.ask()
            time.sleep(GAP_SECONDS)  # the stream's pace
            self.collect()
            return bool(condition())

        self.site.cluster.wait(happened, HANDOVER_SECONDS, what)

    def finish(self) -> None:
        def all_served() -> bool:
            self.collect()
            return not self.open

        self.site.cluster.wait(all_served, ANSWER_SECONDS, "the end of all requests")


@dataclass(frozen=True)
class Word:
    """A line that a worker logged."""

    at: str
    generation: int
    event: str
    fields: dict[str, Any]


def words(site: Site, pool: str, *events: str) -> list[Word]:
    """What workers of a pool logged of these, in order."""
    found = []
    for path in (site.home / "logs").glob(f"worker-{pool}-*.log"):
        generation = int(path.stem.rpartition("-g")[2])
        for line in path.read_text().splitlines():
            said = json.loads(line) if line.startswith("{") else {}
            if said.get("event") in events:
                found.append(Word(said["timestamp"], generation, said["event"], said))
    return sorted(found, key=lambda word: word.at)


def reached(site: Site, pool: str, event: str, generation: int) -> Callable[[], bool]:
    return lambda: any(word.generation >= generation for word in words(site, pool, event))


def kill(site: Site, *names: str) -> None:
    rows = {row["name"]: row for row in site.json("ps")}
    for name in names:
        os.kill(rows[name]["pid"], signal.SIGKILL)


def stream_of(site: Site) -> Stream:
    torch.set_num_threads(1)
    found = Stream(site, {}, {})
    for pool, name in (("over", OVER), ("after", AFTER)):
        model = TransformersModel(models.repo_id(name), task="text-generation", dispatch=True)
        with model.trace(PROMPT):
            logits = model.output.logits.save()
        found.models[pool], found.expected[pool] = model, logits
    return found


def test_a_service_outlives_its_allocations(slurm: Cluster, cache: Path) -> None:
    slurm.restore()
    with sites.running(slurm, cache, POOLS) as site, client_of(Stack(site.home, site.url, site.key)):
        stream = stream_of(site)
        stream.until(reached(site, "over", READY, 2), "a successor beside its predecessor")
        stream.until(reached(site, "after", READY, 2), "a successor after its predecessor")

        # Without gateway and fleet: what was accepted is served, and the lineage goes on.
        stream.until(reached(site, "over", SUBMITTED, 2), "the second handover")
        stream.ask()
        kill(site, "supervisor", "gateway", "fleet")
        slurm.wait(reached(site, "over", DRAINING, 2), HANDOVER_SECONDS, "a handover without gateway and fleet")
        slurm.wait(reached(site, "after", READY, 3), HANDOVER_SECONDS, "the other pool's")
        site.cli("up", "--detach")

        stream.until(reached(site, "over", SUBMITTED, 3), "the third handover")
        stream.ask()
        kill(site, "redis")
        slurm.wait(reached(site, "over", DRAINING, 3), HANDOVER_SECONDS, "a handover that lost Redis")
        stream.until(lambda: len(stream.open) <= 2, "a service as before")
        stream.finish()

        for pool in ("over", "after"):
            _served_once(site, pool, stream.served[pool])
        _in_order(site)
        _one_each(site)


def _served_once(site: Site, pool: str, requests: list[str]) -> None:
    ended = [word.fields for word in words(site, pool, "request ended")]
    completed = [each["request"] for each in ended if each["verdict"] == "completed"]
    assert sorted(completed) == sorted(requests)


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
