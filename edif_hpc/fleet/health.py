"""How launching went lately, per pool, and what the last look saw: kept in Redis, so that it outlives a fleet.

A fleet that is started again must not forget a back-off or a pause; and the command line shows what stands here.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from edif_hpc.core.queue import keys

from .decide import Patience
from .local import Ended


class Health(BaseModel):
    """One pool's.

    Args:
        deaths: workers in a row that died young; `last_death` is when the latest did, as Unix time, `cause` its last
            words.
        launched: workers that were launched and have not ended, by the last look; `pending` why they do not start.
        paused: whether the pool starts nothing since too many died young.
    """

    deaths: int = 0
    last_death: float = 0.0
    cause: str = ""
    launched: int = 0
    pending: str = ""
    paused: bool = False

    def note(self, ended: Ended, patience: Patience, now: float) -> None:
        """Take account of a worker's end."""
        if ended.lived_seconds > patience.young_seconds or not ended.status:
            self.deaths = 0
            return
        self.deaths += 1
        self.last_death = now
        self.cause = ended.cause


async def read_health(redis: Any) -> dict[str, Health]:
    """By pool, of those that a fleet has looked at."""
    found = await redis.hgetall(keys.HEALTH)
    return {name.decode(): Health.model_validate_json(text) for name, text in found.items()}


async def write_health(redis: Any, pool: str, health: Health) -> None:
    await redis.hset(keys.HEALTH, pool, health.model_dump_json())
