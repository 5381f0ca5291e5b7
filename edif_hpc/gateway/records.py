"""What is recorded of requests, for their owners: the stock client's poll, and the JSON behind the command line."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edif_hpc.core.errors import EnvelopeError, NotYours
from edif_hpc.core.queue import Event, Events, Queue, keys
from edif_hpc.core.queue.events import START
from edif_hpc.core.scripts.files import OWN_FORM
from edif_hpc.core.target import Target
from edif_hpc.core.wire import Status, status_message

from .answers import Answers
from .auth import Auth, User
from .sessions import Sessions

TIMES = ("submitted", "claimed", "finished")
LATEST = ("user", "status", "description", "data", "meta")
SUMMARY = (
    "user", "target", "kind", "state", "status", "description", "submitted", "claimed", "updated", "finished",
    "attempt", "worker", "dead", "repeats", "repeated_by", "data", "meta", "record",
)  # fmt: skip
TRANSFER = ("bytes", "format", "part_bytes", "digests")
"""What our own client checks a download by: SHA-256 of each part of `part_bytes`, as the worker had it."""
ELSEWHERE = {"connection": "close"}
"""Whoever asks again does so on a new connection, which is the next gateway's."""
MOST_LISTED = 500
LONGEST_WAIT_SECONDS = 60.0
UNKNOWN = "There is no such request of yours, or it has expired; see `edif-hpc requests list`, or submit it again."


class Records:
    def __init__(self, auth: Auth, queue: Queue, events: Events, answers: Answers, sessions: Sessions) -> None:
        self.auth = auth
        self.queue = queue
        self.events = events
        self.answers = answers
        self.follower = sessions.follower
        self.leaving = sessions.leaving

    # -- the stock client's poll ---------------------------------------------------------------------------------------

    async def response(self, request: Request) -> Response:
        """The latest status. What is unknown, expired or foreign is an ERROR: on 404 the client polls for ever."""
        user = await self.auth.user(request)
        request_id = request.path_params["request_id"]
        request.scope["edif_notes"].update(request=request_id, user=user.name)
        found = await self._fields(request_id, LATEST)
        if not _may_see(user, found):
            return JSONResponse(status_message(request_id, Status.ERROR.value, UNKNOWN))
        event = Event(
            "", Status(found["status"]), found.get("description", ""), _json(found, "data"), _json(found, "meta"), 0.0
        )
        return JSONResponse(await self.answers.message(request_id, event, self.answers.base_url(request)))

    # -- the command line and our client -------------------------------------------------------------------------------

    async def list_recent(self, request: Request) -> Response:
        """A user's own recent requests, newest first; `?user=` and `?limit=` for admins and the patient."""
        user = await self.auth.user(request)
        name = request.query_params.get("user") or user.name
        if name != user.name:
            await self.auth.admin(request)
        limit = min(MOST_LISTED, _number(request, "limit", 50))
        ids = [found.decode() for found in await self.queue.redis.zrevrange(keys.user(name), 0, int(limit) - 1)]
        return JSONResponse({"requests": await self._summaries(ids)})

    async def list_dead(self, request: Request) -> Response:
        """Requests that were given up after too many losses, the latest first: one's own, for an admin everybody's."""
        user = await self.auth.user(request)
        limit = min(MOST_LISTED, _number(request, "limit", 50))
        found = await self._summaries(await self.queue.dead())
        mine = [summary for summary in found if user.admin or summary["user"] == user.name]
        return JSONResponse({"requests": mine[: int(limit)]})

    async def _summaries(self, request_ids: list[str]) -> list[dict[str, Any]]:
        """Those that are still on record, in the order given."""
        pipeline = self.queue.redis.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hmget(keys.request(request_id), SUMMARY)
        rows = await pipeline.execute() if request_ids else []
        found = [_summary(request_id, _named(SUMMARY, row)) for request_id, row in zip(request_ids, rows, strict=True)]
        return [summary for summary in found if summary["status"]]

    async def show(self, request: Request) -> Response:
        request_id, found = await self._own(request)
        summary = _summary(request_id, found)
        data = _json(found, "data")
        if data and summary["status"] == Status.COMPLETED:
            summary["result"] = await self.answers.link(request_id, data, self.answers.base_url(request))
            if "digests" in data:
                summary["transfer"] = {name: data[name] for name in TRANSFER}
        return JSONResponse(summary)

    async def history(self, request: Request) -> Response:
        """Events after a cursor; with `?wait=` seconds, the answer comes when there is one, or this gateway ends."""
        request_id, _ = await self._own(request)
        after = request.query_params.get("after", START)
        if not all(part.isascii() and part.isdigit() for part in after.split("-", 1)):
            raise EnvelopeError("`after` must be a cursor of an earlier event, such as 1700000000000-0.")
        wait = min(LONGEST_WAIT_SECONDS, _number(request, "wait", 0.0))
        events = (await self.events.read({request_id: after})).get(request_id, [])
        if not events and wait:
            events = await self._wait(request_id, after, wait)
        base_url = self.answers.base_url(request)
        return JSONResponse(
            {
                "events": [
                    {"cursor": event.cursor, "at": event.at, **await self.answers.message(request_id, event, base_url)}
                    for event in events
                ],
                "terminal": any(event.status.terminal for event in events),
            },
            headers=ELSEWHERE if self.leaving.is_set() else None,
        )

    async def _wait(self, request_id: str, after: str, seconds: float) -> list[Event]:
        events: list[Event] = []
        stir = asyncio.Event()

        def take(_: str, event: Event) -> None:
            events.append(event)
            stir.set()

        following = self.follower.follow(request_id, take, after)
        waits = [asyncio.create_task(stir.wait()), asyncio.create_task(self.leaving.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.follower.unfollow(following)
            for each in waits:
                each.cancel()
        return events

    async def _own(self, request: Request) -> tuple[str, dict[str, str]]:
        user = await self.auth.user(request)
        request_id = request.path_params["request_id"]
        request.scope["edif_notes"].update(request=request_id, user=user.name)
        found = await self._fields(request_id, SUMMARY)
        if not _may_see(user, found):
            raise NotYours(UNKNOWN)
        return request_id, found

    async def _fields(self, request_id: str, names: tuple[str, ...]) -> dict[str, str]:
        return _named(names, await self.queue.redis.hmget(keys.request(request_id), names))


def _may_see(user: User, found: dict[str, str]) -> bool:
    return "status" in found and (found.get("user") == user.name or user.admin)


def _named(names: tuple[str, ...], values: list[bytes | None]) -> dict[str, str]:
    return {name: value.decode() for name, value in zip(names, values, strict=True) if value is not None}


def _json(found: dict[str, str], name: str) -> Any:
    return json.loads(found[name]) if found.get(name) else None


def _summary(request_id: str, found: dict[str, str]) -> dict[str, Any]:
    """A request for people: times in Unix seconds."""
    target = found.get("target", "")
    times = {name: int(found[name]) / 1000 if found.get(name) else None for name in TIMES}
    data, record, meta = (_json(found, name) or {} for name in ("data", "record", "meta"))
    return {
        "id": request_id,
        "name": record.get("name", ""),
        "user": found.get("user", ""),
        "model": Target.parse(target).name if ":" in target else target,
        "model_key": target,
        "kind": found.get("kind", ""),
        "form": OWN_FORM if meta.get("own_file") else record.get("form", ""),
        "status": found.get("status", ""),
        "description": found.get("description", ""),
        **times,
        "attempt": int(found.get("attempt") or 0),
        "worker": found.get("worker", ""),
        "dead": found.get("dead", ""),
        "repeats": found.get("repeats", ""),
        "repeated_by": found.get("repeated_by", ""),
        "result_bytes": data.get("bytes", data.get("inline")),
        "meta": meta or None,
    }


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    try:
        number = default if text is None else float(text)
    except ValueError:
        number = -1.0
    if number < 0 or not math.isfinite(number):
        raise EnvelopeError(f"`{name}` must be a number that is not negative.")
    return number
