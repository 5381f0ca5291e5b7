"""Stopping a pool and letting it go again: a word in Redis that every fleet reads before it launches."""

from __future__ import annotations

from typing import Any

from edif_hpc.core.queue import keys
from edif_hpc.core.registry import Registry

STOPPED = "stopped"


async def stop(redis: Any, pool: str) -> int:
    """Start no more workers of this pool and have those that run drain. Returns how many were told."""
    await redis.hset(keys.POOLS, pool, STOPPED)
    registry = Registry(redis)
    workers = [worker for worker in await registry.workers() if worker.pool == pool]
    for worker in workers:
        await registry.command(worker.worker_id, "drain")
    return len(workers)


async def resume(redis: Any, pool: str) -> None:
    await redis.hdel(keys.POOLS, pool)


async def stopped(redis: Any) -> set[str]:
    """The pools that an admin stopped."""
    found = await redis.hgetall(keys.POOLS)
    return {name.decode() for name, state in found.items() if state.decode() == STOPPED}
