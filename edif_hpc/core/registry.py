"""What runs: workers with their models, and the other components. Records expire unless they are renewed."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

from .isolation import Isolation
from .queue import keys

ModelState = Literal["loading", "ready", "failed"]


class ModelRecord(BaseModel):
    """One model on one worker. `error` tells why a failed one failed, `failed` when (Unix time of its machine)."""

    model_config = ConfigDict(protected_namespaces=())

    model_key: str
    state: ModelState
    memory_bytes: int = 0
    running: int = 0
    error: str = ""
    failed: float | None = None
    pids: dict[str, int] = {}


class WorkerRecord(BaseModel):
    """What a worker says with every heartbeat. Times are Unix seconds."""

    worker_id: str
    version: str
    host: str
    pid: int
    started: float
    pool: str = "local"
    state: Literal["starting", "serving", "draining"] = "starting"
    isolation: Isolation = Isolation.NONE
    device: str = "cpu"
    deadline: float | None = None
    lineage: str = ""
    generation: int = 1
    memory_budget: int = 0
    model_memory: int = 0
    """Bytes that one model may have: of several devices the largest, or all where models are spread over them."""
    memory_used: int = 0
    running: int = 0
    completed: int = 0
    models: list[ModelRecord] = []
    unable: dict[str, str] = {}
    """Targets that somebody waits for and this worker can never serve, with the reason."""


class Registry:
    def __init__(self, redis: Redis) -> None:
        # redis-py annotates every answer as bytes | str; which of them it is depends on the connection, ours is bytes.
        self.redis: Any = redis

    async def announce(self, record: WorkerRecord, ttl_seconds: float) -> None:
        ttl_ms = int(ttl_seconds * 1000)
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.set(keys.worker(record.worker_id), record.model_dump_json(), px=ttl_ms)
            pipeline.zadd(keys.WORKERS, {record.worker_id: time.time() * 1000 + ttl_ms})
            await pipeline.execute()

    async def leave(self, worker_id: str) -> None:
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(keys.worker(worker_id), keys.control(worker_id))
            pipeline.zrem(keys.WORKERS, worker_id)
            await pipeline.execute()

    async def workers(self) -> list[WorkerRecord]:
        """All workers whose registration has not lapsed."""
        ids = [worker_id.decode() for worker_id in await self.redis.zrange(keys.WORKERS, 0, -1)]
        if not ids:
            return []
        values = await self.redis.mget([keys.worker(worker_id) for worker_id in ids])
        gone = [worker_id for worker_id, value in zip(ids, values, strict=True) if value is None]
        if gone:
            await self.redis.zrem(keys.WORKERS, *gone)
        return [WorkerRecord.model_validate_json(value) for value in values if value is not None]

    async def worker(self, worker_id: str) -> WorkerRecord | None:
        """One worker, if it is registered."""
        found = await self.redis.get(keys.worker(worker_id))
        return WorkerRecord.model_validate_json(found) if found else None

    async def command(self, worker_id: str, command: str) -> None:
        """Tell a worker something; it hears the bell and reads its list.

        Args:
            command: `drain`, `stop`, `load KEY`, `unload KEY`.
        """
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.rpush(keys.control(worker_id), command)
            pipeline.expire(keys.control(worker_id), 60)
            pipeline.publish(keys.BELL_WORKERS, worker_id)
            await pipeline.execute()

    async def commands(self, worker_id: str) -> list[str]:
        """Take everything that was said to this worker."""
        async with self.redis.pipeline(transaction=True) as pipeline:
            pipeline.lrange(keys.control(worker_id), 0, -1)
            pipeline.delete(keys.control(worker_id))
            found, _ = await pipeline.execute()
        return [command.decode() for command in found]

    async def remember_environment(self, environment: dict[str, Any]) -> None:
        """Keep the last worker's environment, so that nnsight.compare() answers also while none is up."""
        await self.redis.set(keys.ENVIRONMENT, json.dumps(environment))

    async def environment(self) -> dict[str, Any] | None:
        found = await self.redis.get(keys.ENVIRONMENT)
        remembered: dict[str, Any] | None = json.loads(found) if found else None
        return remembered
