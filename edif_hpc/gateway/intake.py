"""POST /request: from a stranger's body to a place in the queue, in one round trip to Redis.

Ids, users and times are made here; what the client says of them is ignored. The payload stays opaque.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edif_hpc.core import log
from edif_hpc.core.errors import EnvelopeError
from edif_hpc.core.queue import Queue, Submission
from edif_hpc.core.queue.queue import FOREVER_SECONDS
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store, in_thread, payload_key
from edif_hpc.core.target import Target
from edif_hpc.core.wire import (
    FORMAT_HEADER,
    Envelope,
    Kind,
    ModelKey,
    ResultFormat,
    Status,
    check_client_version,
    status_message,
)

from .auth import Auth, User
from .door import Door
from .multipart import Payload, read_form
from .sessions import Sessions

VERSION_LENGTH = 200
IDEMPOTENCY_HEADER = "idempotency-key"
EXPECTED_HEADER = "edif-expected-seconds"
"""How long a request's run will take, in its user's opinion; otherwise that is learnt per model and kind."""

logger = log.get("gateway")


class Intake:
    def __init__(
        self, settings: Settings, auth: Auth, door: Door, queue: Queue, store: Store, sessions: Sessions, spool: Path
    ) -> None:
        self.settings = settings
        self.auth = auth
        self.door = door
        self.queue = queue
        self.store = store
        self.sessions = sessions
        self.spool = spool
        self.redis_is_full = False
        """Whether small payloads must go to the store too; kept up to date by the pulse."""

    async def post(self, request: Request) -> Response:
        user = await self.auth.user(request)
        version = request.headers.get("nnsight-version", "")
        check_client_version(version)
        limits = self.settings.limits
        payload = Payload(limits.inline_bytes, self.spool)
        try:
            envelope = Envelope.read(await read_form(request, payload, limits.payload_bytes))
            key = ModelKey.parse(envelope.model_key)
            declared = _seconds(request.headers.get(EXPECTED_HEADER, ""))
            asked = request.headers.get(FORMAT_HEADER, "")
            ResultFormat.of(asked, envelope.compress)
            idempotency_key = request.headers.get(IDEMPOTENCY_HEADER, "")
            request_id = new_id(user, idempotency_key)
            request.scope["edif_notes"].update(request=request_id, user=user.name, bytes=payload.size)
            submission = Submission(
                request_id=request_id,
                user=user.name,
                target=str(key),
                kind=Kind.TRACE.value,
                record={
                    "model_key": str(key),
                    "compress": envelope.compress,
                    "format": asked,
                    "env": envelope.env,
                    "bytes": payload.size,
                    "nnsight": version[:VERSION_LENGTH],
                    "python": request.headers.get("python-version", "")[:VERSION_LENGTH],
                },
                session=envelope.session_id,
                priority=user.priority,
                declared_seconds=declared,
            )
            refusal = await self.door.refusal(Target.of([key]), envelope.env, declared)
            await self.accept(submission, payload, refusal, again=bool(idempotency_key))
        finally:
            payload.close()
        return JSONResponse(status_message(request_id, Status.RECEIVED.value, "Accepted."))

    async def accept(self, submission: Submission, payload: Payload, refusal: str = "", *, again: bool) -> None:
        """Give a request its place in the queue, its payload to Redis or to the store.

        Args:
            again: whether it may be there already, since its id was made of an idempotency key.
        """
        if not refusal and (payload.on_disk or self.redis_is_full):
            submission = replace(submission, object_key=await self._store(submission.request_id, payload))
        elif not refusal:
            submission = replace(submission, payload=payload.in_memory())
        session = self.sessions.join(submission.session, submission.user, submission.request_id)
        try:
            await self.queue.submit(submission, refusal=refusal)
        except BaseException:
            if session is not None:
                self.sessions.part(session, submission.request_id)
            raise
        if again:  # it may have happened already, and no bell rings for it once more
            self.sessions.follower.ring(submission.request_id)

    async def _store(self, request_id: str, payload: Payload) -> str:
        """Put a large payload into the store; it is due for deletion from before it exists, so none can be orphaned."""
        key = payload_key(request_id)
        await self.queue.expire_object(key, self.settings.limits.payload_seconds)
        await in_thread(self.store.upload, key, payload.file())
        return key


def _seconds(text: str) -> float:
    try:
        seconds = float(text or 0)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < FOREVER_SECONDS:
        raise EnvelopeError(f"The header {EXPECTED_HEADER} is {text[:40]!r}; it must be a number of seconds.")
    return seconds


def new_id(user: User, idempotency_key: str) -> str:
    """A fresh id, or the same one for the same user's same key, so that a client may safely submit twice."""
    if not idempotency_key:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{user.name}\n{idempotency_key[:256]}".encode()).hexdigest()[:32]
