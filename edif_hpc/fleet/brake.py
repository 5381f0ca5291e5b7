"""People's words about pools, in Redis, that every fleet reads before it launches: start one, drain, stop, resume.

A person who cancels an allocation past this service is heard too: the pool is held, which means that nothing new starts
while what runs goes on, handovers included.
"""

from __future__ import annotations

import time
from typing import Any

from edif_hpc.core.queue import keys
from edif_hpc.core.registry import Registry

STOPPED, HELD, RESUMED = "stopped", "held", "resumed"
ASKED_SECONDS = 600.0
"""How long a start is tried: Slurm may be silent, or the pool in its back-off."""


async def stop(redis: Any, pool: str) -> int:
    """Start no more workers of this pool and have those that run drain. Returns how many were told."""
    await redis.hset(keys.POOLS, pool, STOPPED)
    await redis.hdel(keys.LAUNCHES, pool)
    return await drain(redis, pool)


async def hold(redis: Any, pool: str) -> None:
    """Start no more workers of this pool, unless an admin has stopped it anyway."""
    if (await redis.hget(keys.POOLS, pool)) != STOPPED.encode():
        await redis.hset(keys.POOLS, pool, HELD)
    await redis.hdel(keys.LAUNCHES, pool)


async def drain(redis: Any, pool: str) -> int:
    """Have this pool's workers end what they run and leave. Returns how many were told."""
    registry = Registry(redis)
    workers = [worker for worker in await registry.workers() if worker.pool == pool]
    for worker in workers:
        await registry.command(worker.worker_id, "drain")
    return len(workers)


async def resume(redis: Any, pool: str) -> None:
    """Let a pool start workers again, whatever kept it from that: an admin's stop, or workers that died young."""
    await redis.hset(keys.POOLS, pool, f"{RESUMED} {time.time()}")


async def stopped(redis: Any) -> set[str]:
    """The pools that an admin stopped."""
    return {name for name, (state, _) in (await _states(redis)).items() if state == STOPPED}


async def held(redis: Any) -> set[str]:
    """The pools that somebody's scancel holds."""
    return {name for name, (state, _) in (await _states(redis)).items() if state == HELD}


async def resumed(redis: Any) -> dict[str, float]:
    """Since when, in Unix seconds, the pools may go that an admin resumed last."""
    return {name: float(since) for name, (state, since) in (await _states(redis)).items() if state == RESUMED}


async def _states(redis: Any) -> dict[str, tuple[str, str]]:
    found = {name.decode(): state.decode() for name, state in (await redis.hgetall(keys.POOLS)).items()}
    return {name: (state.partition(" ")[0], state.partition(" ")[2]) for name, state in found.items()}


async def start(redis: Any, pool: str) -> None:
    """Have one more worker started, also when nobody asks; a stopped pool may go again."""
    await resume(redis, pool)
    await redis.hset(keys.LAUNCHES, pool, time.time())


async def asked(redis: Any) -> set[str]:
    """The pools that an admin wants a worker of."""
    found = {name.decode(): float(at) for name, at in (await redis.hgetall(keys.LAUNCHES)).items()}
    late = [name for name, at in found.items() if time.time() - at > ASKED_SECONDS]
    if late:
        await redis.hdel(keys.LAUNCHES, *late)
    return found.keys() - set(late)


async def started(redis: Any, pool: str) -> None:
    """One was."""
    await redis.hdel(keys.LAUNCHES, pool)
