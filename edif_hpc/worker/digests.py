"""SHA-256 of a result's parts, by which a client finds the one that came damaged and asks for it alone.

A result is a file in memory, so hashing it beside its upload reads it twice at no cost to a disk. What this must not
know: where results go.
"""

from __future__ import annotations

import hashlib
import os

from edif_hpc.core.store import in_thread

from .contract import MIB, ResultFile

PART_BYTES = 8 * MIB
MOST_PARTS = 512
"""33 kB of digests in the terminal event, at the most."""
CHUNK = MIB
AT_ONCE_BYTES = 128 * 1024
"""Up to here hashing (1.4 GB/s) takes no longer than handing it to a thread, some 0.1 ms."""


def part_bytes(size: int) -> int:
    """The length of all parts but the last: 8 MiB, or the multiple of it that makes no more than 512 parts."""
    return PART_BYTES * max(1, -(-size // (PART_BYTES * MOST_PARTS)))


async def of(result: ResultFile) -> list[str]:
    """Hexadecimal digests of the parts in order; one for a result that is no longer than a part."""
    fd = os.dup(result.fd)  # a thread goes on when the attempt is cancelled, whose file then closes
    if result.size <= AT_ONCE_BYTES:
        return _digests(fd, result.size)
    return await in_thread(_digests, fd, result.size)


def _digests(fd: int, size: int) -> list[str]:
    length = part_bytes(size)
    with open(fd, "rb", buffering=0):
        return [_digest(fd, start, min(start + length, size)) for start in range(0, size, length)]


def _digest(fd: int, start: int, end: int) -> str:
    seen = hashlib.sha256()
    while start < end:
        chunk = os.pread(fd, min(CHUNK, end - start), start)
        if not chunk:
            raise ValueError(f"a result ends at {start} where {end} bytes were announced")
        seen.update(chunk)
        start += len(chunk)
    return seen.hexdigest()
