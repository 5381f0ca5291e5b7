"""Brings to disk what Redis has written, once a second: what Redis would do itself, if it did not answer meanwhile.

With `appendfsync everysec` Redis flushes in a thread, and while a flush is slow it puts off writing for up to two
seconds and answers all the same: kill it then, and a request that was accepted is gone. With `no` it writes before it
answers, always, so that only the machine's own end can cost anything; this loop keeps that to about a second.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from edif_hpc.core import log

FLUSH_SECONDS = 1.0
PATTERNS = ("*.aof", "appendonlydir/*.aof")
"""Where Redis keeps its append-only files: up to 6.2 in its folder, since 7.0 in one of their own."""

logger = log.get("fleet")


async def keep_flushed(folder: Path) -> None:
    """Flush the append-only files of the Redis that works in `folder`, until cancelled.

    A disk that cannot be flushed is told once, and once again when it can.
    """
    complained = ""
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        try:
            await asyncio.to_thread(flush, folder)
        except OSError as error:
            if str(error) != complained:
                logger.error("what Redis has written cannot be brought to disk", error=str(error))
            complained = str(error)
        else:
            if complained:
                logger.info("what Redis has written is brought to disk again")
            complained = ""


def flush(folder: Path) -> None:
    """Wait until all that was written to the append-only files is on disk.

    Raises:
        OSError: the disk reports a failure, which may mean that something written earlier is lost.
    """
    for path in sorted(found for pattern in PATTERNS for found in folder.glob(pattern)):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # Redis has just put another in its place, flushed
            continue
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
