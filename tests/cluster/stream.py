"""A stream of requests to a service on a cluster, and what its workers logged meanwhile.

Every answer is compared with the same block run here; which request was served for which pool is kept, to be held
against the workers' own words.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
from nnsight.intervention.backends.remote import RemoteError
from nnsight.modeling.transformers import TransformersModel

from .site import Site

PROMPT = "The Eiffel Tower is located in the city of"
GAP_SECONDS = 1.0
ANSWER_SECONDS = 90.0
READY, DRAINING, SUBMITTED, ENDED = "READY", "draining", "successor submitted", "request ended"


@dataclass
class Stream:
    """Requests for pools that serve one model each, and what became of them."""

    site: Site
    models: dict[str, TransformersModel]
    expected: dict[str, torch.Tensor]
    open: dict[str, tuple[str, Any]] = field(default_factory=dict)
    served: dict[str, list[str]] = field(default_factory=dict)

    def ask(self) -> None:
        """One request to each pool; none where the service does not accept one."""
        for pool, model in self.models.items():
            try:
                with model.trace(PROMPT, remote=True, blocking=False) as tracer:
                    logits = model.output.logits.save()  # noqa: F841 - it is the result, by this name
            except RemoteError as error:
                if "cannot reach its Redis" not in str(error):
                    raise
                continue  # it was not accepted
            self.open[tracer.backend.job_id] = (pool, tracer.backend)

    def hold(self, pool: str, seconds: float) -> str:
        """A request that runs for so long; its id."""
        model = self.models[pool]
        with model.trace(PROMPT, remote=True, blocking=False) as tracer:
            time.sleep(seconds)
            logits = model.output.logits.save()  # noqa: F841 - it is the result, by this name
        self.open[tracer.backend.job_id] = (pool, tracer.backend)
        return str(tracer.backend.job_id)

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
                self.served.setdefault(pool, []).append(request)
                del self.open[request]

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Go on asking until something has happened."""

        def happened() -> bool:
            self.ask()
            time.sleep(GAP_SECONDS)  # the stream's pace
            self.collect()
            return bool(condition())

        self.site.cluster.wait(happened, seconds, what)

    def finish(self, seconds: float = ANSWER_SECONDS) -> None:
        def all_served() -> bool:
            self.collect()
            return not self.open

        self.site.cluster.wait(all_served, seconds, "the end of all requests")

    def status(self, request: str) -> str:
        return str(self.site.json("status", request)["status"])

    def assert_served_once(self) -> None:
        """Workers completed each request that was answered, once, and no other."""
        for pool, requests in self.served.items():
            ended = [word.fields for word in words(self.site, pool, ENDED)]
            completed = [each["request"] for each in ended if each["verdict"] == "completed"]
            assert sorted(completed) == sorted(requests)


def stream_of(site: Site, served: Mapping[str, str]) -> Stream:
    """A stream to pools, each of which serves the model of that repo id."""
    torch.set_num_threads(1)
    found = Stream(site, {}, {})
    for pool, repo_id in served.items():
        model = TransformersModel(repo_id, task="text-generation", dispatch=True)
        with model.trace(PROMPT):
            logits = model.output.logits.save()
        found.models[pool], found.expected[pool] = model, logits
    return found


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
