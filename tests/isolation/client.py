"""How hostile and honest blocks reach the service: the stock nnsight client."""

from __future__ import annotations

from typing import Any

import httpx
import torch
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError

from tests.isolation.ground import CANARY, Ground
from tests.isolation.table import Attack, Case, attempt
from tests.support import models
from tests.support.servers import eventually

PROMPT = "The Eiffel Tower is located in the city of"
ANSWER_SECONDS = 90.0
"""For one answer on a machine that does ten other things; also what a restarted model host may take."""


def tiny(**options: Any) -> Any:
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(models.repo_id("gpt2"), task=models.task("gpt2"), **options)


def backend(model: Any, **options: Any) -> RemoteBackend:
    """What `remote=True` would make, with other options."""
    return RemoteBackend(model.to_model_key(), env=model._remoteable_get_env(), **options)


def numbers(model: Any, **how: Any) -> Any:
    """An honest request."""
    with model.trace(PROMPT, **how):
        logits = model.lm_head.output.clone().save()
    return logits  # noqa: RET504 - only names leave a block


def outcome(model: Any, case: Case, g: dict[str, Any]) -> str:
    """Send one attack and wait for its end."""
    try:
        return bare(model, case.attack, g) if case.bare else tried(model, case.attack, g)
    except RemoteError as error:
        return f"ERROR {error}"


def tried(model: Any, attack: Attack, g: dict[str, Any]) -> str:
    with model.trace(PROMPT, remote=True):
        said = attempt(attack, g).save()
    return said  # noqa: RET504 - only names leave a block


def bare(model: Any, attack: Attack, g: dict[str, Any]) -> str:
    with model.trace(PROMPT, remote=True):
        said = [attack(g)].save()
    return str(said[0])


class Trap:
    """Whoever unpickles it writes its pid into a file."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        text = f"open({self.mark!r}, 'w').write(str(__import__('os').getpid()))"
        return eval, (text,)


def trap(g: dict) -> Any:
    """The same, made where the block runs, since the one above would go off on the way there."""

    class Inner:
        def __reduce__(self) -> object:
            text = f"open({g['mark']!r}, 'w').write(str(__import__('os').getpid()))"
            return eval, (text,)

    return [Inner(), g["padding"]]


def carry(model: Any, sprung: Trap) -> None:
    """A block that captures something."""
    with model.trace(PROMPT, remote=True):
        said = [str(sprung)].save()  # noqa: F841


def unpacked_by_nobody(model: Any, attack: Attack, g: dict[str, Any]) -> bytes:
    """Send without waiting, and download the result as bytes: the client unpickles nothing either."""
    sent = backend(model, blocking=False)
    with model.trace(PROMPT, backend=sent):
        said = attack(g).save()  # noqa: F841
    return raw_result(sent)


def raw_result(sent: RemoteBackend) -> bytes:
    headers = {"ndif-api-key": sent.api_key}

    def link() -> str | None:
        answer = httpx.get(f"{sent.host}/response/{sent.job_id}", headers=headers, timeout=30)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        latest = answer.raise_for_status().json()
        if latest["status"] == "ERROR":
            raise RemoteError(latest["description"])
        return str(latest["data"]) if latest["status"] == "COMPLETED" else None

    url = eventually(link, ANSWER_SECONDS, f"the result of {sent.job_id}")
    return httpx.get(url, timeout=60).raise_for_status().content


def leave_a_canary(ground: Ground, model: Any, key: str) -> None:
    """Somebody else's request, full of a text that must not be met again."""
    canary = CANARY
    with model.trace(f"{PROMPT} {canary}", backend=backend(model, api_key=key)):
        kept = {canary: [canary * 2, torch.zeros(3)]}.save()
    assert canary in kept
