"""Huge pages for a heap that is forked often: a fork copies one entry for 2 MiB instead of 512, and its end frees one.

Importing torch and transformers leaves 280 MB of small objects, some 70,000 pages. Laid together, a fork of them takes
about 3 ms instead of 10, and its end is cheaper too (2 cores, kernel 6.18). Kernels before 6.1 cannot do it on demand;
nothing but speed is lost there.
"""

from __future__ import annotations

import ctypes
import errno

from edif_hpc.worker.sandbox.kernel import libc

MADV_COLLAPSE = 25
HUGE = 2 * 1024 * 1024
UNABLE = (errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY)
"""The kernel is too old or has no huge pages, no memory for them now, or the range holds something it leaves alone."""


def collapse() -> None:
    """Lay what this process has written so far into huge pages, as far as the kernel can. Takes 0.6 to 0.9 s."""
    for start, end in _own_memory():
        first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if first < last and libc().madvise(first, last - first, MADV_COLLAPSE) != 0:
            code = ctypes.get_errno()
            if code not in UNABLE:
                raise OSError(code, "madvise")


def _own_memory() -> list[tuple[int, int]]:
    """Address ranges that no file backs and that this process may write."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, permissions, _, _, inode, *name = line.split()
            if permissions == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
                start, end = addresses.split("-")
                found.append((int(start, 16), int(end, 16)))
    return found
