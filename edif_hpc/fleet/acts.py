"""What the fleet does beside its look at the queue, since it may take minutes: launch, take back what waits.

Slurm's commands answer when slurmctld pleases. Each pool has one act of a kind at a time, in a thread that nothing else
waits for, so that no pool waits for another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Acts:
    """Acts of one kind.

    Args:
        pools: how many there are at most, and so how many threads.
    """

    def __init__(self, pools: int) -> None:
        self._threads = ThreadPoolExecutor(max(1, pools), thread_name_prefix="act")
        self._running: dict[str, asyncio.Task[None]] = {}

    def busy(self, pool: str) -> bool:
        """Whether this pool's last act goes on, or its end was not settled yet."""
        return pool in self._running

    def begin(self, pool: str, act: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """Have this done for a pool, if it is not being done."""
        if pool not in self._running:
            self._running[pool] = asyncio.create_task(act(pool))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """For the act itself: what blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def settle(self) -> None:
        """Take account of the acts that have ended.

        Raises:
            Exception: what one of them failed with; the others' turn comes at the next call.
        """
        for pool in [pool for pool, task in self._running.items() if task.done()]:
            self._running.pop(pool).result()

    async def end(self) -> None:
        """Wait for what goes on: an allocation that is being submitted must be known."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._threads.shutdown(wait=False)
