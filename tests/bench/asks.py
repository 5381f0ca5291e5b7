"""What the benchmark asks for: three blocks on two models, ready for both clients.

Every subject is asked the same, and for no views, whose whole storage the floor would send. The stock client traces the
block anew each time, as users do; the lean one sends what was serialised once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

from edif_hpc.core.errors import EdifError
from edif_hpc.fleet import demo_model
from edif_hpc.fleet.shelf import Progress
from tests.support import models

from . import lean

PROMPT = "The Eiffel Tower is located in the city of Paris. " * 3
"""34 tokens of the tiny model's tokenizer, 33 of SmolLM2's."""
LARGE_FLOATS = 35_000_000
"""140 MB as float32, random, so that compression helps nobody."""
TINY, SMOLLM2 = "tiny", "smollm2"
How = dict[str, Any]


class _Capture(Backend):
    """Takes what a trace would send, and sends nothing."""

    def __call__(self, tracer: Any = None) -> None:
        self.blob = RequestModel.serialize(tracer, CONFIG.API.COMPRESS)


@dataclass(frozen=True)
class Ask:
    """One model and its block. `trace({"remote": True})` is the stock client's way, `prepared` the lean one's."""

    name: str
    model_key: str
    trace: Callable[[How], Any]
    prepared: lean.Prepared
    large: Callable[[How], Any] | None = None


def lay_models(cache: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """Both models in one hub cache; returns it, and why SmolLM2 is missing if it is."""
    hub = models.build_cache(cache, ["gpt2"])
    said = set()

    def report(progress: Progress) -> None:
        if progress.step not in said:
            said.add(progress.step)
            say(progress.step)

    try:
        demo_model.bring(hub, cache / "downloads", report)
        missing = ""
    except EdifError as error:
        missing = str(error)
    for path in (hub, *hub.rglob("*")):  # the service may run as another user
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    models.offline_client(hub)
    return hub, missing


def tiny() -> Ask:
    model = TransformersModel(models.repo_id("gpt2"), task="text-generation")

    def trace(how: How) -> Any:
        hidden = logits = None
        with model.trace(PROMPT, **how):
            hidden = model.transformer.h[1].output.save()
            logits = model.output.logits[:, -1].clone().save()
        return hidden, logits

    def large(how: How) -> Any:
        logits = result = None
        with model.trace(PROMPT, **how):
            logits = model.output.logits[:, -1].clone().save()
            result = torch.rand(LARGE_FLOATS).save()
        return result, logits

    return Ask(TINY, model.to_model_key(), trace, _prepared(model, trace), large)


def smollm2() -> Ask:
    model = TransformersModel(demo_model.REPO_ID, task="text-generation")

    def trace(how: How) -> Any:
        hidden = logits = None
        with model.trace(PROMPT, **how):
            hidden = model.model.layers[1].output.save()
            logits = model.output.logits[:, -1].clone().save()
        return hidden, logits

    return Ask(SMOLLM2, model.to_model_key(), trace, _prepared(model, trace))


def local_large(seconds: Callable[[Callable[[], Any]], float]) -> float:
    """Seconds of the large block's own work on this machine, in this process: what no server can save."""
    model = TransformersModel(models.repo_id("gpt2"), task="text-generation", dispatch=True)

    def block() -> Any:
        with model.trace(PROMPT):
            logits = model.output.logits[:, -1].clone().save()
            result = torch.rand(LARGE_FLOATS).save()
        return result, logits

    return seconds(block)


def _prepared(model: Any, trace: Callable[[How], Any]) -> lean.Prepared:
    capture = _Capture()
    trace({"backend": capture})
    return lean.Prepared(model.to_model_key(), capture.blob, CONFIG.API.COMPRESS, model._remoteable_get_env())
