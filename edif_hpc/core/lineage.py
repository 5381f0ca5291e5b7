"""The chain of allocations that keeps one pool slot alive: who is which generation, and who may ask for the next.

Several may want the same successor at once: the worker by its clock, its supervisor, a fleet that repairs. One of them
holds the intent, a lease, while it looks at Slurm and submits; the allocation that then begins enters its generation,
once. So a taker that dies in between delays the successor by a lease and never doubles it: what Slurm got all the same
is found by its name or, when it begins, turned away here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis

from .queue import keys

KEPT_SECONDS = 30 * 86400
"""Longer than any walltime; every step renews it."""
INTENT_SECONDS = 240.0
"""A look at Slurm and a submission, each of which may wait for a busy slurmctld for its whole time-out."""
SLOWER, FASTER = 1.0, 0.3
"""How much of a newly seen handover time counts: longer ones at once, shorter ones by and by."""

# KEYS: lineage. ARGV: generation, taker, lease ms, kept s.
TAKE = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local number = ARGV[1]
local ended, job, taker, till = unpack(redis.call('HMGET', KEYS[1],
    'ended', number .. ':job', number .. ':taker', number .. ':until'))
if job then return {'submitted', job} end
if ended then return {'ended', ended} end
if taker and taker ~= ARGV[2] and tonumber(till) > now then return {'taken', taker} end
redis.call('HSET', KEYS[1], number .. ':taker', ARGV[2], number .. ':until', now + ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {'yours', ''}
"""
# KEYS: lineage. ARGV: generation, job, Unix time, kept s. The first to be recorded stays.
RECORD = """
if redis.call('HSETNX', KEYS[1], ARGV[1] .. ':job', ARGV[2]) == 1 then
    redis.call('HSET', KEYS[1], ARGV[1] .. ':asked', ARGV[3])
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
return redis.call('HGET', KEYS[1], ARGV[1] .. ':job')
"""
# KEYS: lineage. ARGV: generation, taker.
ABANDON = """
if redis.call('HGET', KEYS[1], ARGV[1] .. ':taker') == ARGV[2] then
    redis.call('HDEL', KEYS[1], ARGV[1] .. ':taker', ARGV[1] .. ':until')
end
"""
# KEYS: lineage. ARGV: generation, why, kept s. One that a later generation serves in is not for an earlier one to end.
END = """
if tonumber(redis.call('HGET', KEYS[1], 'current') or '0') > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'ended', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
# KEYS: lineage. ARGV: generation, job, kept s.
ENTER = """
local number = tonumber(ARGV[1])
local current, ended, job, used, asked, models = unpack(redis.call('HMGET', KEYS[1],
    'current', 'ended', ARGV[1] .. ':job', 'used', ARGV[1] .. ':asked', 'models'))
current = tonumber(current or '0')
if current > number then return {'superseded', 'generation ' .. current .. ' serves'} end
if job and job ~= ARGV[2] then return {'superseded', 'allocation ' .. job .. ' is this generation'} end
if ended and current < number then return {'superseded', 'the lineage has ended: ' .. ended} end
redis.call('HSET', KEYS[1], 'current', number, ARGV[1] .. ':job', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return {'entered', used or '', asked or '', models or '[]'}
"""


class Answer(StrEnum):
    """What who wants a successor is told."""

    YOURS = "yours"
    """Submit it, and record it."""
    TAKEN = "taken"
    """Somebody else is at it."""
    SUBMITTED = "submitted"
    ENDED = "ended"


@dataclass(frozen=True)
class Intent:
    """`detail` is the allocation's id, who is at it, or why the lineage has ended."""

    answer: Answer
    detail: str = ""


@dataclass(frozen=True)
class Entry:
    """How an allocation was received as its generation.

    Args:
        superseded: why it must not serve; empty: it may.
        used: Unix time of the lineage's last request, if there was one.
        asked: Unix time at which this generation was submitted, if somebody asked for it.
        models: keys of those that the predecessor held.
    """

    superseded: str = ""
    used: float | None = None
    asked: float | None = None
    models: Sequence[str] = ()


class Lineages:
    def __init__(self, redis: Redis) -> None:
        self.redis: Any = redis
        self._take = redis.register_script(TAKE)
        self._record = redis.register_script(RECORD)
        self._abandon = redis.register_script(ABANDON)
        self._enter = redis.register_script(ENTER)
        self._end = redis.register_script(END)

    async def take(self, lineage: str, generation: int, taker: str, seconds: float = INTENT_SECONDS) -> Intent:
        """Try to become the one who submits this generation."""
        arguments: list[int | str | float] = [generation, taker, int(seconds * 1000), KEPT_SECONDS]
        answer, detail = await self._take(keys=[keys.lineage(lineage)], args=arguments)
        return Intent(Answer(answer.decode()), detail.decode())

    async def record(self, lineage: str, generation: int, job_id: str) -> str:
        """Remember what was submitted. Returns the allocation that is this generation: perhaps one recorded before."""
        arguments: list[int | str | float] = [generation, job_id, time.time(), KEPT_SECONDS]
        found = await self._record(keys=[keys.lineage(lineage)], args=arguments)
        return str(found.decode())

    async def abandon(self, lineage: str, generation: int, taker: str) -> None:
        """Let others try at once: certainly nothing was submitted."""
        await self._abandon(keys=[keys.lineage(lineage)], args=[generation, taker])

    async def enter(self, lineage: str, generation: int, job_id: str) -> Entry:
        """Begin to be a generation. Only one allocation ever is, and none after a later one has begun."""
        arguments: list[int | str | float] = [generation, job_id, KEPT_SECONDS]
        verdict, *rest = await self._enter(keys=[keys.lineage(lineage)], args=arguments)
        if verdict == b"superseded":
            return Entry(superseded=rest[0].decode())
        used, asked = (float(text) if text else None for text in rest[:2])
        return Entry(used=used, asked=asked, models=json.loads(rest[2]))

    async def job_of(self, lineage: str, generation: int) -> str:
        """The allocation that is or will be this generation; empty: none is known."""
        found = await self.redis.hget(keys.lineage(lineage), f"{generation}:job")
        return found.decode() if found else ""

    async def bequeath(self, lineage: str, used: float, models: Sequence[str]) -> None:
        """Leave to the successor what to load, and when the last request came: idleness is counted on."""
        await self.redis.hset(keys.lineage(lineage), mapping={"used": used, "models": json.dumps(list(models))})

    async def end(self, lineage: str, generation: int, why: str) -> bool:
        """No more generations after this one: what is pending turns itself away if it should begin.

        Returns:
            Whether it is so; not when a later generation has begun, which the lineage lives on in.
        """
        arguments: list[int | str | float] = [generation, why, KEPT_SECONDS]
        return bool(await self._end(keys=[keys.lineage(lineage)], args=arguments))

    async def ended(self, lineage: str) -> str:
        """Why it has ended; empty: it has not."""
        found = await self.redis.hget(keys.lineage(lineage), "ended")
        return found.decode() if found else ""

    async def note_ready(self, lineage: str, generation: int) -> bool:
        """A generation has a model ready. Whether for the first time: a worker that crashed has one ready again."""
        return bool(await self.redis.hsetnx(keys.lineage(lineage), f"{generation}:ready", time.time()))

    async def pace(self, pool: str) -> float | None:
        """Seconds from asking until a successor was ready, as seen lately in this pool."""
        found = await self.redis.hget(keys.pace(pool), "handover")
        return float(found) if found else None

    async def note_pace(self, pool: str, seconds: float) -> None:
        known = await self.pace(pool)
        if known is not None:
            seconds = known + (seconds - known) * (SLOWER if seconds > known else FASTER)
        await self.redis.hset(keys.pace(pool), "handover", seconds)
