"""What the workers last said, at most a moment old: door, keys and pages ask far more often than it changes."""

from __future__ import annotations

import time

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.registry import Registry, WorkerRecord

FRESH_SECONDS = 1.0


class Observed:
    def __init__(self, registry: Registry, required: Isolation) -> None:
        self.registry = registry
        self.required = required
        self._workers: list[WorkerRecord] = []
        self._until = 0.0

    async def workers(self) -> list[WorkerRecord]:
        if time.monotonic() >= self._until:
            self._workers = await self.registry.workers()
            self._until = time.monotonic() + FRESH_SECONDS
        return self._workers

    async def all_locked(self) -> bool:
        """Whether no request's code can run with the service's own uid and a network."""
        if self.required.covers(Isolation.LOCKED):
            return True
        return all(
            worker.isolation.covers(Isolation.LOCKED) for worker in await self.workers() if worker.state != "starting"
        )
