"""Where results wait while the object store is away: on local disk, up to a limit, so that they hold no memory.

A result is born in an anonymous file in memory. One that cannot be stored moves here, and the model goes on with the
next request. What does not fit stays where it is and keeps its place at the model: so memory is bounded too.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from edif_hpc.core import log

from .contract import ResultFile

CHUNK_BYTES = 64 * 1024 * 1024
MOST_RESULTS = 200
"""Each holds a descriptor and a lease."""
UPLOADS = 4
"""Results on their way to the store at a time, each in several parts."""

logger = log.get("worker")


class Spool:
    """Unnamed files in one folder: the kernel removes each with its last descriptor, however the worker ends.

    Args:
        folder: on a local disk; a file system in memory would defeat the purpose.
        limit: bytes that may wait there together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.used = 0
        self.waiting = 0
        self.away = False
        """Whether the store refused the latest upload: the next result need not hold memory until it is refused too."""
        self.turns = asyncio.Semaphore(UPLOADS)

    async def take(self, result: ResultFile) -> bool:
        """Move a result here, so that it takes no memory any more; False when it does not fit, or the disk is full."""
        if self.used + result.size > self.limit or self.waiting >= MOST_RESULTS:
            return False
        self.used += result.size
        self.waiting += 1
        try:
            moved = await asyncio.to_thread(self._copy, result)
        except OSError as error:
            self.forget(result)
            logger.warning("the spool takes no result", folder=str(self.folder), error=str(error))
            return False
        os.close(result.fd)
        result.fd = moved
        return True

    def forget(self, result: ResultFile) -> None:
        """A result that was taken has left."""
        self.used -= result.size
        self.waiting -= 1

    def _copy(self, result: ResultFile) -> int:
        with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
            done = 0
            while done < result.size:
                done += os.sendfile(file.fileno(), result.fd, done, min(CHUNK_BYTES, result.size - done))
            return os.dup(file.fileno())
