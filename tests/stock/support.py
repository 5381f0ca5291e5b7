"""What the stock suite shares: requests that wait until they are let go, and the wire spoken by hand.

Everything here uses the stock client, or plain HTTP where a client must misbehave. What it must not know: how the
service works inside.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG
from nnsight.schema.response import Status

from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import Stack

PROMPT = "The Eiffel Tower is located in the city of"
ORDER = ["RECEIVED", "QUEUED", "PROVISIONING", "DEPLOYING", "DISPATCHED", "RUNNING", "COMPLETED"]
FOREVER = 100.0
"""Seconds that a request sleeps which a test ends by cancelling it."""
ANSWER_SECONDS = 60.0
"""How long a test waits for something that takes a moment, on a machine that does ten other things."""


def tiny(name: str = "gpt2", **options: Any) -> Any:
    """A client's model: architecture only, no weights."""
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(models.repo_id(name), task=models.task(name), **options)


def backend(model: Any, kind: Callable[..., RemoteBackend] = RemoteBackend, **options: Any) -> Any:
    """What `remote=True` would make, of another kind or with other options."""
    return kind(model.to_model_key(), **{"env": model._remoteable_get_env(), **options})


class Keep(RemoteBackend):
    """Keeps the payload instead of sending it, for clients made by hand."""

    blob = b""

    def __call__(self, tracer: Any = None) -> None:
        self.blob = self._serialize(tracer)


class Watched(RemoteBackend):
    """The stock backend; `came` tells whether the result came on the socket (bytes) or by a link (str)."""

    came: type | None = None

    def download_result(self, url: Any) -> Any:
        self.came = type(url)
        return super().download_result(url)


def ask(model: Any, number: float, kind: Callable[..., RemoteBackend] = RemoteBackend, **options: Any) -> Any:
    """A request whose answer carries `number`; returns its backend."""
    chosen = backend(model, kind, **options)
    with model.trace(PROMPT, backend=chosen):
        answer = (model.lm_head.output[0, -1].sum() * 0 + number).save()  # noqa: F841
    return chosen


def sleeping(model: Any, seconds: float = FOREVER, **options: Any) -> Any:
    """A non-blocking request that sleeps; returns its backend."""
    chosen = backend(model, **{"blocking": False, **options})
    with model.trace(PROMPT, backend=chosen):
        time.sleep(seconds)
        answer = model.lm_head.output[0, -1].sum().save()  # noqa: F841
    return chosen


def result_of(polled: RemoteBackend) -> dict[str, Any]:
    """Poll until there is a result."""
    return eventually(polled, ANSWER_SECONDS, f"the result of {polled.job_id}")


def reached(polled: RemoteBackend, *statuses: str) -> None:
    """Poll until the request is at one of these statuses."""

    def there() -> bool:
        polled.poll()
        return polled.status is not None and polled.status.value in statuses

    eventually(there, ANSWER_SECONDS, f"{polled.job_id} being {' or '.join(statuses)}")


def error_of(polled: RemoteBackend) -> str:
    """Poll until the request ends in ERROR; returns its sentence."""

    def ended() -> str | None:
        try:
            polled.poll()
        except RemoteError as error:
            return str(error)
        assert polled.status is not Status.COMPLETED, "the request completed"
        return None

    return eventually(ended, ANSWER_SECONDS, f"the error of {polled.job_id}")


def works(model: Any) -> None:
    """An honest request is answered rightly."""
    with model.trace(PROMPT, remote=True):
        logits = model.lm_head.output[0, -1].clone().save()
    assert logits.shape == (512,)
    assert torch.isfinite(logits).all()


@contextmanager
def occupied(stack: Stack, model: Any) -> Iterator[RemoteBackend]:
    """The model is busy with a request, as another user's, until the block ends."""
    holder = sleeping(model, api_key=key_of(stack, "holder"))
    reached(holder, "RUNNING")
    try:
        yield holder
    finally:
        cancel(stack, holder.job_id)


def cancel(stack: Stack, request_id: str | None) -> None:
    stack.cli("cancel", str(request_id))


def withdraw(stack: Stack, request: RemoteBackend) -> None:
    """Cancel as the request's own user; what has ended already is let be."""
    url = f"{stack.url}/api/requests/{request.job_id}/cancel"
    httpx.post(url, headers={"ndif-api-key": request.api_key}, timeout=30).raise_for_status()


def key_of(stack: Stack, user: str) -> str:
    """A key of another user, made once."""
    if user not in stack.keys:
        stack.keys[user] = stack.json("keys", "create", user)["key"]
    return stack.keys[user]


@contextmanager
def compressing(compress: bool) -> Iterator[None]:
    before = CONFIG.API.COMPRESS
    CONFIG.API.COMPRESS = compress
    try:
        yield
    finally:
        CONFIG.API.COMPRESS = before


# -- by hand -----------------------------------------------------------------------------------------------------------


def payload(model: Any) -> bytes:
    """The bytes of an ordinary block, compressed as the client is configured."""
    kept = ask(model, 1.0, Keep)
    return kept.blob


def post(stack: Stack, model_key: str, blob: bytes, **fields: Any) -> RemoteBackend:
    """Send a body by hand; returns what polls for its end."""
    envelope = {"model_key": model_key, "session_id": "", "compress": CONFIG.API.COMPRESS, "env": {}, **fields}
    answer = httpx.post(
        f"{stack.url}/request",
        data={"data": json.dumps(envelope)},
        files={"blob": ("request", blob, "application/octet-stream")},
        headers={"ndif-api-key": stack.key, "nnsight-version": "0.8.1"},
        timeout=30,
    )
    answer.raise_for_status()
    return RemoteBackend(model_key, blocking=False, job_id=answer.json()["id"])


def seen_by(running: AsyncRemoteBackend) -> tuple[list[Any], Any]:
    """Iterate to the end: every status in the order in which it came, and the result (None without one)."""

    async def all_of_it() -> list[Any]:
        return [update async for update in running]

    updates = asyncio.run(all_of_it())
    result = updates.pop() if isinstance(updates[-1], dict) else None
    return updates, result
