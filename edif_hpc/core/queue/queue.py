"""The queue's transitions, as methods. Each is one script in `lua/`, so a process may die between any two of them.

Every write of an attempt carries the token of its claim. A worker whose token is no longer the current one learns it
from the answer (`LeaseLost`, or verdict LOST) and must kill what it runs.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from ..errors import LeaseLost, QuotaExceeded
from ..settings import LimitSettings
from ..wire import Status
from . import keys

FOREVER_SECONDS = 1e9
"""Remaining time of a worker that has no walltime."""
AGING_SECONDS = 600.0
"""How long a request waits before it competes with those one priority above it."""
SWEEP_BATCH = 200
SETTLING_SECONDS = 10.0
"""After a silence of Redis workers have at least this long to renew: one may hang in two attempts to connect."""
EVENTS_BESIDE_LINES = 2000
"""Events kept of a request beside its printed lines; of more, the oldest go."""
NORMAL_PRIORITY = 5
SCRIPTS = ("submit", "claim", "event", "note", "renew", "finish", "release", "sweep", "withdraw", "delete")


@dataclass(frozen=True)
class Submission:
    """A request at the door. `payload` rides along when `object_key` is empty."""

    request_id: str
    user: str
    target: str
    kind: str
    record: dict[str, Any]
    payload: bytes = b""
    object_key: str = ""
    session: str = ""
    priority: int = NORMAL_PRIORITY
    declared_seconds: float = 0.0
    repeats: str = ""
    """The ended request whose payload is tried again."""


@dataclass(frozen=True)
class Swept:
    """What one sweep did. `due_seconds`: until the next lease ends, None when none is held."""

    reclaimed: int
    dead: int
    overdue: int
    due_seconds: float | None = None


@dataclass(frozen=True)
class Claim:
    """A worker's right to run one request, until its lease ends or its token is overtaken."""

    request_id: str
    token: str
    target: str
    attempt: int
    record: dict[str, Any]
    payload: bytes
    object_key: str
    kind: str
    expected_seconds: float
    submitted: float
    user: str


@dataclass(frozen=True)
class Step:
    """One event of an attempt; `sequence` counts from 1 within it, and a repeated one is written once."""

    sequence: int
    status: Status
    description: str = ""


class Verdict(StrEnum):
    OK = "ok"
    CANCEL = "cancel"
    LOST = "lost"


class Release(StrEnum):
    """Why a request goes back: handed back whole, cut off by the walltime, or lost without an explanation."""

    HANDBACK = "handback"
    WALLTIME = "walltime"
    LOSS = "loss"


class Queue:
    """All transitions over one Redis connection pool (`decode_responses=False`)."""

    def __init__(self, redis: Redis, limits: LimitSettings) -> None:
        # redis-py annotates every answer as bytes | str; which of them it is depends on the connection, ours is bytes.
        self.redis: Any = redis
        self.limits = limits
        self._retention_ms = int(limits.retention_seconds * 1000)
        lua = files(__package__) / "lua"
        most = f"local MOST_EVENTS = {limits.log_lines + EVENTS_BESIDE_LINES}\n"
        common = keys.LUA_KEYS + most + (lua / "common.lua").read_text()
        self._scripts: dict[str, AsyncScript] = {
            name: redis.register_script(common + (lua / f"{name}.lua").read_text()) for name in SCRIPTS
        }

    async def _run(self, script: str, *args: Any) -> Any:
        return await self._scripts[script](args=args)

    # -- the gateway's side ------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission, refusal: str = "") -> None:
        """Accept a request; with `refusal`, record it as ended by that sentence. Submitting an id twice is once.

        Raises:
            QuotaExceeded: the user has too many open requests.
        """
        accepted, _ = await self._run(
            "submit", submission.request_id, submission.user, submission.target, submission.priority, submission.kind,
            submission.session, submission.object_key, self.limits.open_requests, self._retention_ms,
            int(submission.declared_seconds * 1000), refusal, json.dumps(submission.record), submission.payload,
            submission.repeats,
        )  # fmt: skip
        if not accepted:
            raise QuotaExceeded(
                f"You have {self.limits.open_requests} requests waiting or running, which is the limit; "
                "wait for some to end, or cancel them."
            )

    async def withdraw(self, request_id: str, user: str, description: str, *, only_waiting: bool = False) -> str:
        """End a request from outside. Returns `ended`, `told` (its worker was), `done` or `unknown`."""
        answer: bytes = await self._run(
            "withdraw", request_id, user, description, self._retention_ms, int(only_waiting)
        )
        return answer.decode()

    async def delete(self, request_id: str, user: str) -> tuple[str, list[str]]:
        """Forget an ended request: record, events, result and payload.

        Args:
            user: whose it must be; "" for an admin.

        Returns:
            `deleted` with the objects in the store that are to go with it, `unknown`, or what it is doing: `waiting`
            or `claimed`.
        """
        outcome, *objects = await self._run("delete", request_id, user)
        return outcome.decode(), [key.decode() for key in objects]

    async def payload(self, request_id: str) -> bytes | None:
        """A small payload, while it is kept."""
        value: bytes | None = await self.redis.get(keys.payload(request_id))
        return value

    async def dead(self, limit: int = 1000) -> list[str]:
        """Requests that were given up after too many losses, the latest first."""
        since = time.time() * 1000 - self._retention_ms
        found = await self.redis.zrevrangebyscore(keys.DEAD, "+inf", since, start=0, num=limit)
        return [request_id.decode() for request_id in found]

    async def describe(self, request_id: str) -> dict[str, str] | None:
        """Everything recorded of a request, or None when unknown or expired."""
        found = await self.redis.hgetall(keys.request(request_id))
        return {name.decode(): value.decode() for name, value in found.items()} or None

    async def result(self, request_id: str) -> bytes | None:
        """An inline result, while it is kept."""
        value: bytes | None = await self.redis.get(keys.result(request_id))
        return value

    # -- the worker's side -------------------------------------------------------------------------------------------

    async def claim(
        self, worker: str, targets: Sequence[str], lease_seconds: float, remaining_seconds: float = FOREVER_SECONDS
    ) -> Claim | None:
        """The next request of the first of `targets` that has one, if it fits into the remaining time."""
        if not targets:
            return None
        token = secrets.token_hex(16)
        found = await self._run(
            "claim", worker, token, int(lease_seconds * 1000), int(remaining_seconds * 1000),
            int(AGING_SECONDS * 1000), *targets,
        )  # fmt: skip
        if found is None:
            return None
        request_id, target, attempt, record, payload, object_key, kind, expected, submitted, user = found
        return Claim(
            request_id=request_id.decode(),
            token=token,
            target=target.decode(),
            attempt=int(attempt),
            record=json.loads(record),
            payload=payload,
            object_key=object_key.decode(),
            kind=kind.decode(),
            expected_seconds=float(expected) / 1000,
            submitted=float(submitted) / 1000,
            user=user.decode(),
        )

    async def event(self, claim: Claim, *steps: Step) -> None:
        """Events of an attempt, in order.

        Raises:
            LeaseLost: the attempt is no longer the current one.
        """
        if not await self._run("event", claim.request_id, claim.token, self.limits.log_lines, *_flat(steps)):
            raise LeaseLost(f"Request {claim.request_id} was taken from this worker.")

    async def renew(self, claims: Sequence[Claim], lease_seconds: float) -> list[Verdict]:
        """Renew all leases a worker holds, in one round trip. Verdicts in the order given."""
        if not claims:
            return []
        pairs = [part for claim in claims for part in (claim.request_id, claim.token)]
        return [Verdict(verdict.decode()) for verdict in await self._run("renew", int(lease_seconds * 1000), *pairs)]

    async def finish(
        self,
        claim: Claim,
        status: Status,
        description: str = "",
        *,
        data: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        run_seconds: float = -1.0,
        result: bytes = b"",
        object_key: str = "",
        steps: Sequence[Step] = (),
    ) -> None:
        """Write the terminal status, with the result or the object that holds it. Idempotent.

        Args:
            steps: events before it; those that are written already are passed over.

        Raises:
            LeaseLost: the attempt is no longer the current one; whatever it stored must go.
        """
        if not await self._run(
            "finish", claim.request_id, claim.token, status.value, description,
            json.dumps(data) if data else "", json.dumps(meta) if meta else "",
            self._retention_ms, run_seconds * 1000, object_key, result, self.limits.log_lines, *_flat(steps),
        ):  # fmt: skip
            raise LeaseLost(f"Request {claim.request_id} was taken from this worker.")

    async def release(self, claim: Claim, reason: Release, why: str) -> str:
        """Give a request back; its owner is told `why`, a clause without a full stop.

        Returns `queued`, `ended` (too many losses or walltimes) or `lost`.
        """
        answer: bytes = await self._run(
            "release",
            claim.request_id,
            claim.token,
            reason.value,
            why,
            self.limits.attempts,
            self._retention_ms,
        )
        return answer.decode()

    # -- the fleet's side --------------------------------------------------------------------------------------------

    async def waiting(self) -> dict[str, int]:
        """Targets with waiting requests, most first."""
        found = await self.redis.zrange(keys.TARGETS, 0, -1, desc=True, withscores=True)
        return {target.decode(): int(count) for target, count in found}

    async def waiting_ids(self, limit: int = 10_000) -> list[str]:
        """Requests that wait, oldest first."""
        return [request_id.decode() for request_id in await self.redis.zrange(keys.WAITING_SINCE, 0, limit - 1)]

    async def waiting_for(self, target: str) -> list[str]:
        """Requests that wait for one target, oldest first."""
        ids = await self.waiting_ids()
        pipeline = self.redis.pipeline(transaction=False)
        for request_id in ids:
            pipeline.hget(keys.request(request_id), "target")
        wanted = target.encode()
        return [request_id for request_id, found in zip(ids, await pipeline.execute(), strict=True) if found == wanted]

    async def oldest(self, limit: int = SWEEP_BATCH) -> dict[str, float]:
        """For how many seconds the oldest request of each target has waited, among the `limit` oldest of all."""
        found = await self.redis.zrange(keys.WAITING_SINCE, 0, limit - 1, withscores=True)
        if not found:
            return {}
        pipeline = self.redis.pipeline(transaction=False)
        for request_id, _ in found:
            pipeline.hget(keys.request(request_id.decode()), "target")
        pipeline.time()
        *targets, (seconds, microseconds) = await pipeline.execute()
        waited: dict[str, float] = {}
        for (_, since), target in zip(found, targets, strict=True):
            if target is not None:
                waited.setdefault(target.decode(), seconds + microseconds / 1e6 - since / 1000)
        return waited

    async def note(self, request_ids: Iterable[str], status: Status, description: str) -> int:
        """Tell waiting requests what is being done for them. Says the same thing once."""
        ids = list(request_ids)
        return int(await self._run("note", status.value, description, *ids)) if ids else 0

    async def sweep(self, lease_seconds: float, interval_seconds: float) -> Swept:
        """Reclaim lapsed leases and end overdue requests. Safe to run anywhere."""
        settling = max(lease_seconds, SETTLING_SECONDS)
        reclaimed, dead, overdue, due = await self._run(
            "sweep", int(settling * 1000), int(interval_seconds * 1000), self.limits.attempts,
            self._retention_ms, int(self.limits.queue_seconds * 1000), SWEEP_BATCH,
        )  # fmt: skip
        return Swept(int(reclaimed), int(dead), int(overdue), int(due) / 1000 if int(due) >= 0 else None)

    async def due_objects(self, now: float, limit: int = SWEEP_BATCH) -> list[str]:
        """Objects in the store that may be deleted."""
        found = await self.redis.zrangebyscore(keys.OBJECTS, "-inf", int(now * 1000), start=0, num=limit)
        return [key.decode() for key in found]

    async def is_current(self, request_id: str, token: str) -> bool:
        """Whether an attempt, known by the beginning of its token, is the one that the request is at."""
        current, state = await self.redis.hmget(keys.request(request_id), ("token", "state"))
        return state == b"claimed" and bool(token) and bool(current) and current.decode().startswith(token)

    async def expire_object(self, object_key: str, seconds: float) -> None:
        """Have an object deleted in time, whatever becomes of the process that stores it; a later call overrides."""
        await self.redis.zadd(keys.OBJECTS, {object_key: int((time.time() + seconds) * 1000)})

    async def forget_objects(self, object_keys: Sequence[str]) -> None:
        if object_keys:
            await self.redis.zrem(keys.OBJECTS, *object_keys)


def _flat(steps: Sequence[Step]) -> list[str | int]:
    return [part for step in steps for part in (step.sequence, step.status.value, step.description)]
