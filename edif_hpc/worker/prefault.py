"""The pages that every run needs, brought in while an executor waits and not while somebody waits for it.

A fork starts with nothing of its own: its first write to each page copies it, its first look into each library maps
it, and a short run spends more time on that than on its work (8 of 14 ms for a small GPT-2, 35 of 145 ms for SmolLM2;
2 cores, kernel 6.18). Which pages those are is learnt once, from a rehearsal in a fork of its own. The work is the same
either way, so nothing is lost when spares are in short supply.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from edif_hpc.worker.sandbox.kernel import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, libc, prctl

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23
PAGE = os.sysconf("SC_PAGE_SIZE")
PRESENT, OF_A_FILE, ONLY_OURS = 1 << 63, 1 << 61, 1 << 56
"""Bits of an entry in /proc/PID/pagemap."""
LARGEST_MAPPING = 1 << 30
"""Weights beyond this are left to the run: mapping them ahead would take longer than a spare is likely to wait."""
BRIDGED = 16
"""A gap of so many pages is mapped along when it is only read: the kernel does the same on a fault."""
UNABLE = (errno.EINVAL, errno.ENOMEM, errno.EFAULT, errno.EAGAIN)
"""The kernel is older than 5.14, or this process has something else there than the one that rehearsed."""
NUMBERS_A_SPAN = 3
PIPE_FD = 3


@dataclass(frozen=True)
class Span:
    """Neighbouring pages that are all read, or all written."""

    start: int
    length: int
    advice: int


def learn(rehearse: Callable[[], object]) -> tuple[Span, ...]:
    """What `rehearse` touches in a fork of this process; nothing when the fork does not live to say it.

    Call it with one thread, where forking is safe. Takes as long as the rehearsal, and 0.1 s for each GB mapped.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _rehearse(rehearse, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    numbers = array("Q")
    numbers.frombytes(said[: len(said) // numbers.itemsize * numbers.itemsize])
    return tuple(Span(*numbers[at : at + NUMBERS_A_SPAN]) for at in range(0, len(numbers) - 2, NUMBERS_A_SPAN))


def bring(spans: tuple[Span, ...]) -> None:
    """Have the pages here. What cannot be had is left to the run."""
    madvise = libc().madvise
    for span in spans:
        if madvise(span.start, span.length, span.advice) != 0 and (code := ctypes.get_errno()) not in UNABLE:
            raise OSError(code, "madvise")


def _rehearse(rehearse: Callable[[], object], writer: int) -> NoReturn:
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _keep_only(writer)
        maps, pagemap = _open_own()
        rehearse()
        numbers = array("Q")
        for span in _spans(maps, pagemap):
            numbers.extend((span.start, span.length, span.advice))
        with os.fdopen(PIPE_FD, "wb") as pipe:
            pipe.write(numbers.tobytes())
    finally:
        os._exit(0)


def _keep_only(writer: int) -> None:
    """Nothing is left to take from a process that others of its user may open for a moment."""
    os.dup2(writer, PIPE_FD)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(PIPE_FD):
        os.dup2(nowhere, standard)
    os.closerange(PIPE_FD + 1, os.sysconf("SC_OPEN_MAX"))


def _open_own() -> tuple[BinaryIO, BinaryIO]:
    """This process's map. Only who may be traced may open it; once open, it stays readable."""
    prctl(PR_SET_DUMPABLE, 1)
    try:
        return open("/proc/self/maps", "rb"), open("/proc/self/pagemap", "rb", buffering=0)
    finally:
        prctl(PR_SET_DUMPABLE, 0)


def _spans(maps: BinaryIO, pagemap: BinaryIO) -> Iterator[Span]:
    for line in maps.read().splitlines():
        addresses, permissions, *_ = line.split(None, 2)
        start, end = (int(address, 16) for address in addresses.split(b"-"))
        if permissions.endswith(b"p") and end - start <= LARGEST_MAPPING and start < sys.maxsize:
            entries = array("Q")
            pagemap.seek(start // PAGE * entries.itemsize)
            entries.frombytes(pagemap.read((end - start) // PAGE * entries.itemsize))
            yield from _touched(start, entries, writable=permissions[1:2] == b"w")


def _touched(start: int, entries: array[int], *, writable: bool) -> Iterator[Span]:
    read = [at for at, entry in enumerate(entries) if entry & PRESENT and entry & OF_A_FILE]
    yield from _joined(start, read, MADV_POPULATE_READ, BRIDGED)
    if writable:
        own = [
            at for at, entry in enumerate(entries) if entry & PRESENT and entry & ONLY_OURS and not entry & OF_A_FILE
        ]
        yield from _joined(start, own, MADV_POPULATE_WRITE, 0)


def _joined(start: int, pages: list[int], advice: int, bridged: int) -> Iterator[Span]:
    first = last = None
    for page in pages:
        if first is None or last is None:
            first = page
        elif page - last > 1 + bridged:
            yield Span(start + first * PAGE, (last + 1 - first) * PAGE, advice)
            first = page
        last = page
    if first is not None and last is not None:
        yield Span(start + first * PAGE, (last + 1 - first) * PAGE, advice)
