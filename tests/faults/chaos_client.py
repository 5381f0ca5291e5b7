"""One user of a service in trouble: `python -m tests.faults.chaos_client`, told what to do on its standard input.

It sends a request every so often and waits for each, as a script of its user's would: with our client, which needs
nothing more, or with the stock one, whose user looks into the list of requests when the connection breaks. A line of
JSON on standard output tells of each request.
"""

# A block's variables are what it saves: ruff cannot know that they are used.

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG

import edif_hpc
from tests.stock.support import PROMPT
from tests.support import models

from .flight import EVERY_LARGE, LARGE_FLOATS, LEFT, drawn

AGAIN_SECONDS = 0.5
PATIENCE = 600.0
OURS, STOCK = "ours", "stock"


@dataclass(frozen=True)
class Task:
    """What a client is told: `count` requests, one every `pace` seconds from the Unix time `begin` on."""

    kind: str
    url: str
    key: str
    cache: str
    first: int
    count: int
    begin: float
    pace: float
    run_seconds: float
    logits: list[float]


@dataclass(frozen=True)
class Answered:
    """How one request fared. `wrong` is empty when all is well."""

    number: int
    seconds: float
    broken: int
    wrong: str


def main() -> None:
    task = Task(**json.loads(sys.stdin.readline()))
    models.offline_client(Path(task.cache))
    model = TransformersModel(models.repo_id("gpt2"), task=models.task("gpt2"))
    if task.kind == OURS:
        edif_hpc.connect(task.url, task.key, progress=False)
    else:
        CONFIG.API.HOST, CONFIG.API.APIKEY, CONFIG.APP.REMOTE_LOGGING = task.url, task.key, False
    print(json.dumps("ready"), flush=True)
    for turn in range(task.count):
        time.sleep(max(0.0, task.begin + turn * task.pace - time.time()))
        print(json.dumps(asdict(_one(task, model, task.first + turn))), flush=True)


def _one(task: Task, model: Any, number: int) -> Answered:
    began, broken = time.monotonic(), 0
    if task.kind == OURS:
        found = _ask(model, number, task.run_seconds, remote=True)
    else:
        before = set(_listed(task))
        while True:
            kept = _Kept(model.to_model_key(), env=model._remoteable_get_env())
            try:
                found = _ask(model, number, task.run_seconds, backend=kept)
            except LEFT:
                broken += 1
                found = _found_again(task, kept, before)
            if found is not None:
                break
            time.sleep(AGAIN_SECONDS)
    return Answered(number, time.monotonic() - began, broken, _wrong(task, number, found))


class _Kept(RemoteBackend):
    """The stock backend, which also keeps what it was answered."""

    def _push(self, result: Any, tracer: Any) -> None:
        self.found = result


def _ask(model: Any, number: int, seconds: float, **how: Any) -> dict[str, Any]:
    floats, large = LARGE_FLOATS, number % EVERY_LARGE == 0
    answer = asked = noise = None
    if large:
        with model.trace(PROMPT, **how):
            time.sleep(seconds)
            answer = model.lm_head.output[0, -1].clone().save()
            asked = (answer.sum() * 0 + number).save()
            noise = torch.rand(floats, generator=torch.Generator().manual_seed(number)).save()
    else:
        with model.trace(PROMPT, **how):
            time.sleep(seconds)
            answer = model.lm_head.output[0, -1].clone().save()
            asked = (answer.sum() * 0 + number).save()
    if kept := how.get("backend"):
        found: dict[str, Any] = kept.found
        return found
    return {"answer": answer, "asked": asked, "noise": noise}


def _wrong(task: Task, number: int, found: dict[str, Any]) -> str:
    if found["asked"] != number:
        return f"asked {number}, and was answered what {found['asked']} had asked"
    if not torch.allclose(found["answer"], torch.tensor(task.logits), atol=1e-5):
        return f"{number} has other logits than a local run"
    if number % EVERY_LARGE == 0 and not torch.equal(found["noise"], drawn(number)):
        return f"{number} has other numbers than it drew"
    return ""


# -- what a user of the stock client does when the connection breaks ---------------------------------------------------


def _listed(task: Task) -> list[str]:
    """The user's requests, as soon as the service answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            answer = httpx.get(
                f"{task.url}/api/requests", params={"limit": 500}, headers={"ndif-api-key": task.key}, timeout=60
            )
            answer.raise_for_status()
            return [row["id"] for row in answer.json()["requests"]]
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
        time.sleep(AGAIN_SECONDS)


def _found_again(task: Task, kept: RemoteBackend, before: set[str]) -> dict[str, Any] | None:
    """The result of the request that is in the list now and was not; None: it was never accepted."""
    new = [name for name in _listed(task) if name not in before]
    if not new:
        return None
    assert len(new) == 1, f"one request was sent, and the list has {new}"
    client = RemoteBackend(kept.model_key, env=kept.env, blocking=False, job_id=new[0])
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if (found := client.poll()) is not None:
                return dict(found)
        except httpx.HTTPError:
            pass  # the service is away again
        time.sleep(AGAIN_SECONDS)
    raise TimeoutError(f"{new[0]} did not end")


if __name__ == "__main__":
    main()
