"""How many commands a service has given to Slurm, by kind: sites count them, and slow down or block who gives too many.

Whoever gives one counts it in memory and writes that to Redis when it suits: a command never waits for the books, and
none is lost for them. What the site calls its commands does not matter here: there are few kinds, and so few fields.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Literal

from redis.asyncio import Redis

from .queue import keys

Command = Literal["sbatch", "scancel", "squeue"]
"""All that this project gives to Slurm."""
HOUR_SECONDS = 3600
KEPT_SECONDS = 3 * HOUR_SECONDS
"""An hour's own numbers are read while it runs and during the next one."""


class Tally:
    """What one process has counted and not written yet. Threads may count at the same time."""

    def __init__(self) -> None:
        self._counted: dict[tuple[int, Command], int] = {}
        self._lock = threading.Lock()

    def count(self, command: Command) -> None:
        """One more command, given now."""
        self._add({(int(time.time()) // HOUR_SECONDS, command): 1})

    @property
    def is_empty(self) -> bool:
        return not self._counted

    async def write(self, redis: Redis) -> None:
        """Add everything to what others have written. What fails is kept; an answer that got lost makes it count twice.

        Raises:
            RedisError, OSError: Redis is away.
        """
        with self._lock:
            taken, self._counted = self._counted, {}
        if not taken:
            return
        client: Any = redis
        try:
            async with client.pipeline(transaction=True) as pipeline:
                for (hour, command), number in taken.items():
                    pipeline.hincrby(keys.SLURM_COMMANDS, command, number)
                    pipeline.hincrby(keys.slurm_hour(hour), command, number)
                    pipeline.expire(keys.slurm_hour(hour), KEPT_SECONDS)
                await pipeline.execute()
        except BaseException:
            self._add(taken)
            raise

    def _add(self, counted: dict[tuple[int, Command], int]) -> None:
        with self._lock:
            for place, number in counted.items():
                self._counted[place] = self._counted.get(place, 0) + number


async def slurm_commands(redis: Redis) -> dict[str, dict[str, int]]:
    """What was written, by kind: in `total`, in the `last_hour` of the clock that is full, and in `this_hour`."""
    hour = int(time.time()) // HOUR_SECONDS
    client: Any = redis
    async with client.pipeline(transaction=False) as pipeline:
        for key in (keys.SLURM_COMMANDS, keys.slurm_hour(hour - 1), keys.slurm_hour(hour)):
            pipeline.hgetall(key)
        found = await pipeline.execute()
    return {
        name: {command.decode(): int(number) for command, number in sorted(each.items())}
        for name, each in zip(("total", "last_hour", "this_hour"), found, strict=True)
    }
