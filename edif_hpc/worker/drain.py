"""How a worker lets go of its requests when it ends: what can end, ends; everything else goes back in time.

Before a deadline what is left is shared out: to what still runs, then to results on their way to the store, then to the
last words to Redis. Without one there is patience, but an object store that is away gets little of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from edif_hpc.core.queue import Release

from .attempt import Attempt
from .spool import Spool

DRAIN_SECONDS = 20.0
"""How long what runs may go on when no walltime says otherwise."""
AWAY_SECONDS = 10.0
"""How long an object store that is away is waited for."""
LEFT_SHARE = 0.5
"""Of what is left before the deadline, for uploads; then of the rest, for the last words."""
LOOK_SECONDS = 1.0


class Drain:
    """One worker's goodbye.

    Args:
        deadline: when it must have ended, in Unix seconds; None: never.
        attempts: those under way, as they come and go.
        tasks: what they run in.
        patience: seconds for the last words where no deadline is set.
    """

    def __init__(
        self,
        deadline: float | None,
        attempts: Mapping[str, Attempt],
        tasks: set[asyncio.Task[Any]],
        spool: Spool,
        patience: float,
    ) -> None:
        self.deadline = deadline
        self.attempts = attempts
        self.tasks = tasks
        self.spool = spool
        self.patience = patience

    async def run(self, reason: Release, remaining: float) -> None:
        """Return when nothing is under way any more, or no time is left to wait for it.

        Args:
            remaining: seconds that requests may still run.
        """
        for attempt in self._under_way():
            if not attempt.started:
                attempt.hand_back(Release.HANDBACK)  # no walltime cut it off
        await self._wait(remaining if reason is Release.WALLTIME else min(DRAIN_SECONDS, remaining))
        for attempt in self._under_way():
            attempt.hand_back(reason)
        await self._wait_for_uploads()
        for attempt in self._under_way():
            attempt.abandon()
        await self._wait(self._share())

    def _under_way(self) -> list[Attempt]:
        return list(self.attempts.values())

    async def _wait_for_uploads(self) -> None:
        began, most = time.monotonic(), self._share()
        while self.tasks and (waited := time.monotonic() - began) < most:
            if self.spool.away and waited > AWAY_SECONDS:
                return
            await self._wait(min(LOOK_SECONDS, most - waited))

    def _share(self) -> float:
        if self.deadline is None:
            return self.patience
        return min(self.patience, max(0.0, LEFT_SHARE * (self.deadline - time.time())))

    async def _wait(self, seconds: float) -> None:
        if self.tasks:
            await asyncio.wait(list(self.tasks), timeout=seconds)
