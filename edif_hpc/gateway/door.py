"""Whether a request may be queued at all: its model allowed here, in the cache, and small enough for some worker, and
its run short enough for some allocation.

A refusal is a sentence, not an HTTP error: the request is accepted and ends in ERROR at once, so that blocking and
polling clients see the same.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from edif_hpc.core.allowed import check_model
from edif_hpc.core.errors import ModelError
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings
from edif_hpc.core.target import Target
from edif_hpc.core.walltime import flush_seconds
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.checkpoint import Checkpoint, describe
from edif_hpc.hardware.memory import check_fits, gib, required_bytes
from edif_hpc.hardware.tensor_parallel import check_split

from .observed import Observed

CACHE_SECONDS = 5.0
CACHE_ENTRIES = 1000
MEMORY_SHARE = 0.75
"""Of a machine's memory, for models, where the settings name none."""


class Door:
    def __init__(self, settings: Settings, cache: Path, observed: Observed) -> None:
        self.settings = settings
        self.cache = cache
        self.observed = observed
        self._described: dict[tuple[str, str | None], tuple[float, Checkpoint]] = {}

    async def refusal(self, target: Target, env: dict[str, Any], declared_seconds: float = 0.0) -> str:
        """Why this cannot be asked for, in one sentence; "" when it can.

        Args:
            declared_seconds: how long the run will take, in its user's opinion; 0: none was given.
        """
        try:
            self._check_time(target, declared_seconds)
            self._check_adapter(env.get("peft"))
            checkpoints = [await self._checked(key) for key in target.keys]
            await self._check_room(checkpoints)
        except ModelError as error:
            return str(error)
        return ""

    async def _checked(self, key: ModelKey) -> Checkpoint:
        """A model that may be served here, by itself."""
        check_model(self.settings.models, key)
        checkpoint = await self._describe(key.repo_id, key.revision)
        if checkpoint.adapter:
            raise ModelError(
                f"{key.repo_id!r} is a PEFT adapter, not a model; load its base {checkpoint.base!r} and name the "
                "adapter with peft=."
            )
        check_split(checkpoint, self.settings.models.tensor_parallel)
        return checkpoint

    async def _check_room(self, checkpoints: list[Checkpoint]) -> None:
        models, largest = self.settings.models, await self._largest()
        dtypes = [models.dtype.get(checkpoint.repo_id, "auto") for checkpoint in checkpoints]
        for checkpoint, dtype in zip(checkpoints, dtypes, strict=True):
            check_fits(checkpoint, largest, dtype, ranks=models.tensor_parallel)
        if len(checkpoints) > 1:
            needed = sum(map(required_bytes, checkpoints, dtypes))
            together = await self._largest(together=True)
            if needed > together:
                raise ModelError(
                    f"{' and '.join(checkpoint.repo_id for checkpoint in checkpoints)} need about {gib(needed)} "
                    f"together, and the largest worker has {gib(together)}; use fewer or smaller models at a time, or "
                    "ask the admin for a larger worker."
                )

    def _check_time(self, target: Target, seconds: float) -> None:
        """Only what somebody declared: what is learnt is learnt from runs that fitted."""
        pools = [pool for pool in self.settings.pool if all(pool.serves(key.repo_id) for key in target.keys)]
        pools = [pool for pool in pools if target.pool in ("", pool.name)]
        if not pools or any(pool.launcher == "local" for pool in pools):
            return
        times = (pool.walltime_seconds for pool in pools)
        longest = max(time - flush_seconds(time) for time in times)
        if seconds > longest:
            raise ModelError(
                f"This would take {seconds:.0f} s, and the longest allocation for {target.name!r} leaves "
                f"{longest:.0f} s for a run; split it, or ask the admin for a pool with more time."
            )

    def _check_adapter(self, adapter: Any) -> None:
        if adapter is None:
            return
        if not isinstance(adapter, str) or adapter not in self.settings.models.adapters:
            raise ModelError(
                f"The adapter {str(adapter)[:120]!r} may not be used on this service; ask its admin to add it to "
                "models.adapters."
            )

    async def _describe(self, repo_id: str, revision: str | None) -> Checkpoint:
        """From the shared cache, which may be a slow file system: in a thread, and remembered for a moment."""
        now = time.monotonic()
        until, checkpoint = self._described.get((repo_id, revision), (0.0, None))
        if checkpoint is None or now >= until:
            checkpoint = await asyncio.to_thread(describe, self.cache, repo_id, revision)
            if len(self._described) >= CACHE_ENTRIES:
                self._described.clear()
            self._described[repo_id, revision] = (now + CACHE_SECONDS, checkpoint)
        return checkpoint

    async def _largest(self, *, together: bool = False) -> int:
        """Memory of the largest worker there is or could be, in bytes: for one model, or for several `together`."""
        settings = self.settings
        own = self._told() or max(map(_memory, settings.pool), default=_here())
        gpus = any(pool.accelerator != "cpu" for pool in settings.pool)
        if gpus and (together or settings.worker.isolation is Isolation.NONE):
            own = sys.maxsize  # over as many devices as only a worker can count
        workers = await self.observed.workers()
        return max([own, *(w.memory_budget if together else w.model_memory or w.memory_budget for w in workers)])

    def _told(self) -> int:
        """What the settings say; where workers may have GPUs, it is for each of those that share a model."""
        worker = self.settings.worker
        return worker.memory_bytes * (1 if worker.device == "cpu" else self.settings.models.tensor_parallel)


def _memory(pool: Pool) -> int:
    """What a worker of this pool may have; more than anybody asks for where only its first worker can tell."""
    if pool.launcher == "local":
        return _here()
    if pool.accelerator == "cpu" and pool.memory_bytes:
        return int(pool.memory_bytes * MEMORY_SHARE)
    return sys.maxsize


def _here() -> int:
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE)
