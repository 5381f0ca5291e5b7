"""Keep trying while Redis or the store is away: a worker keeps its results until the other side is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import ConnectionError, ReadOnlyError, TimeoutError

from edif_hpc.core import log
from edif_hpc.core.errors import Unavailable

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
AWAY = (ConnectionError, TimeoutError, ReadOnlyError, Unavailable, OSError)
"""What says that the other side is away, as opposed to that it refuses."""

logger = log.get("worker")


async def until_done(
    what: str,
    action: Callable[[], Awaitable[T]],
    give_up_seconds: float,
    on_first_failure: Callable[[], None] | None = None,
) -> T:
    """Repeat an idempotent action until it succeeds.

    Raises:
        Unavailable: it did not succeed within `give_up_seconds`.
    """
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return await action()
        except AWAY as error:
            if time.monotonic() - started > give_up_seconds:
                raise Unavailable(f"Gave up to {what} after {give_up_seconds:.0f} s: {error}") from error
            if pause == FIRST_PAUSE_SECONDS:
                logger.warning("waiting for the other side", what=what, error=str(error))
                if on_first_failure:
                    on_first_failure()
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
