"""What the gateway does every few seconds: keep sessions known, look again for lost bells, watch Redis's memory."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from edif_hpc.core import log
from edif_hpc.core.apikeys import ApiKeys

from .auth import ADMIN_TAG, OWNER
from .intake import Intake
from .sessions import Sessions

BEAT_SECONDS = 5.0

logger = log.get("gateway")


class Pulse:
    def __init__(
        self, redis: Redis, keys: ApiKeys, sessions: Sessions, intake: Intake, *, owner_key: str, inline_bytes: int
    ) -> None:
        self.redis: Any = redis
        self.keys = keys
        self.sessions = sessions
        self.intake = intake
        self.owner_key = owner_key
        self.inline_bytes = inline_bytes
        self._reconnected = asyncio.Event()
        self._returned = True
        sessions.follower.on_connected = self._reconnected.set

    async def run(self) -> None:
        while True:
            try:
                await self.beat()
            except (RedisError, OSError) as error:
                logger.warning("redis is away", error=str(error))
                await asyncio.sleep(1.0)
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._reconnected.wait()
            except TimeoutError:
                continue

    async def beat(self) -> None:
        """One beat. Raises what Redis raises; the next beat tries again."""
        if self._reconnected.is_set():
            self._reconnected.clear()
            self._returned = True
        if self._returned:  # it may be a Redis that lost its data
            await self.keys.ensure(self.owner_key, OWNER, tags=(ADMIN_TAG,))
        await self.sessions.refresh()
        if self._returned:
            await self.sessions.find_lost()
        self._returned = False
        self.sessions.follower.ring_all()
        await self.sessions.follower.drop_forgotten()
        used = (await self.redis.info("memory"))["used_memory"]
        self.intake.redis_is_full = used > self.inline_bytes
