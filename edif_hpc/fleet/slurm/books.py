"""The books of a process that has no event loop: what it counts is written to Redis from a thread of its own.

For supervisors on batch hosts and for the command line. A thread that hangs or a Redis that is away holds nobody up:
commands only count in memory, and an end waits for the last writing no longer than a moment.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.errors import EdifError
from edif_hpc.core.tally import Command, Tally

RETRY_SECONDS = 30.0
END_SECONDS = 2.0
"""How long the end of a process may wait for what it has not written yet."""


class Books:
    """Counts at once, writes soon.

    Args:
        endpoint: finds Redis; called in the thread, since it reads files that may be slow to come or not there.
    """

    def __init__(self, endpoint: Callable[[], RedisEndpoint]) -> None:
        self._endpoint = endpoint
        self._tally = Tally()
        self._counted = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="books", daemon=True)
        self._thread.start()

    def count(self, command: Command) -> None:
        """One more command. Never blocks and never fails."""
        self._tally.count(command)
        self._counted.set()

    def close(self) -> None:
        """Write what is left, if that is possible now."""
        self._closing.set()
        self._counted.set()
        self._thread.join(END_SECONDS)

    def _keep(self) -> None:
        while not self._closing.is_set():
            self._counted.wait()
            self._counted.clear()
            while not self._tally.is_empty and not self._written():
                if self._closing.wait(RETRY_SECONDS):
                    break
        if not self._tally.is_empty:
            self._written()

    def _written(self) -> bool:
        try:
            asyncio.run(self._write())
        except (EdifError, RedisError, OSError):
            return False  # no word of it: on the command line this would stand above the reason that Redis is away for
        return True

    async def _write(self) -> None:
        async with self._endpoint().client(retries=0, connections=1) as redis:
            await self._tally.write(redis)


@contextmanager
def books(endpoint: Callable[[], RedisEndpoint]) -> Iterator[Callable[[Command], None]]:
    """For one command of the command line: gives what counts, and writes at the end."""
    kept = Books(endpoint)
    try:
        yield kept.count
    finally:
        kept.close()
