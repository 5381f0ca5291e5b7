"""What an owner does to a request that is there already: cancel it, try it again, have it forgotten.

An accepted request has exactly one terminal status, so one that is tried again stays ended: its payload becomes a new
request, and each record names the other.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edif_hpc.core import log
from edif_hpc.core.errors import ModelError, NotYours, Unavailable, WrongState
from edif_hpc.core.queue import Queue, Submission
from edif_hpc.core.settings import LimitSettings
from edif_hpc.core.store import Store, in_thread, payload_key
from edif_hpc.core.target import Target
from edif_hpc.core.wire import Status

from .auth import Auth, User
from .door import Door
from .records import UNKNOWN

logger = log.get("gateway")


class Control:
    def __init__(self, auth: Auth, queue: Queue, store: Store, door: Door, limits: LimitSettings) -> None:
        self.auth = auth
        self.queue = queue
        self.store = store
        self.door = door
        self.limits = limits

    async def cancel(self, request: Request) -> Response:
        """`ended`, `told` (its worker was), or `done` (there was nothing left to cancel)."""
        user, request_id = await self._asked(request)
        by = f"Cancelled by {user.name}." if user.admin else "Cancelled."
        outcome = await self.queue.withdraw(request_id, _whose(user), by)
        if outcome == "unknown":
            raise NotYours(UNKNOWN)
        return JSONResponse({"id": request_id, "outcome": outcome})

    async def retry(self, request: Request) -> Response:
        """Make a new request of one that failed, with the same payload and for the same user."""
        user, request_id = await self._asked(request)
        found = await self.queue.describe(request_id)
        if found is None or (found["user"] != user.name and not user.admin):
            raise NotYours(UNKNOWN)
        if found["state"] != "done":
            raise WrongState("This request has not ended, so there is nothing to try again; wait, or cancel it first.")
        if found["status"] != Status.ERROR:
            raise WrongState("This request has a result; get it with `edif-hpc result`, or submit it anew.")
        payload = await self.queue.payload(request_id)
        if payload is None and not found["object"]:
            raise WrongState("Nothing of this request's payload was kept; submit it anew from where it came.")
        again = await self._submit(request_id, found, payload)
        request.scope["edif_notes"].update(repeated_by=again)
        return JSONResponse({"id": again, "repeats": request_id})

    async def _submit(self, request_id: str, found: dict[str, str], payload: bytes | None) -> str:
        record: dict[str, Any] = json.loads(found["record"])
        declared = float(found["declared"]) / 1000
        refusal = await self.door.refusal(Target.parse(found["target"]), record.get("env") or {}, declared)
        if refusal:
            raise ModelError(refusal)
        again = uuid.uuid4().hex
        await self.queue.submit(
            Submission(
                request_id=again,
                user=found["user"],
                target=found["target"],
                kind=found["kind"],
                record=record,
                payload=payload or b"",
                object_key=await self._copy(found["object"], again) if payload is None else "",
                priority=int(found["priority"]),
                declared_seconds=declared,
                repeats=request_id,
            )
        )
        return again

    async def _copy(self, object_key: str, request_id: str) -> str:
        """A payload of its own for the new request; it is due for deletion from before it exists."""
        key = payload_key(request_id)
        await self.queue.expire_object(key, self.limits.payload_seconds)
        await in_thread(self.store.copy, object_key, key)
        return key

    async def delete(self, request: Request) -> Response:
        """Forget an ended request at once, its files in the store included."""
        user, request_id = await self._asked(request)
        outcome, objects = await self.queue.delete(request_id, _whose(user))
        if outcome == "unknown":
            raise NotYours(UNKNOWN)
        if outcome != "deleted":
            what = "waits" if outcome == "waiting" else "runs"
            raise WrongState(f"This request still {what}; cancel it first with `edif-hpc cancel {request_id}`.")
        if objects:
            try:
                await in_thread(self.store.delete, objects)
                await self.queue.forget_objects(objects)
            except Unavailable as error:  # they are due, and the fleet deletes them when the store is back
                logger.warning("objects are deleted later", error=str(error), count=len(objects))
        return JSONResponse({"id": request_id, "outcome": outcome})

    async def _asked(self, request: Request) -> tuple[User, str]:
        user = await self.auth.user(request)
        request_id = request.path_params["request_id"]
        request.scope["edif_notes"].update(request=request_id, user=user.name)
        return user, request_id


def _whose(user: User) -> str:
    """Whose requests this user may touch; "" for all of them."""
    return "" if user.admin else user.name
