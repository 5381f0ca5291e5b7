"""Descriptors and environment: what a forked process inherited without asking for it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
from pathlib import Path

from edif_hpc.worker.sandbox.kernel import libc, syscall

_STANDARD = 3


def keep_only(kept: tuple[int, ...]) -> None:
    """Put /dev/null on 0, 1, 2 and the kept descriptors on 3, 4, 5, ... in their order; close everything else.

    Each kept one first moves above all the targets, so that it may come from anywhere, 0 to 2 included, and no two
    overwrite each other.
    """
    first_free = _STANDARD + len(kept)
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first_free) for fd in kept]
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    null_parked = fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, first_free)
    for target in range(_STANDARD):
        os.dup2(null_parked, target)
    for target, fd in enumerate(parked, start=_STANDARD):
        os.dup2(fd, target, inheritable=False)
    _close_from(first_free)


def _close_from(first: int) -> None:
    try:
        syscall("close_range", first, 0xFFFFFFFF, 0)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        # Kernels before 5.9, such as RHEL 8's. The listing's own descriptor is gone by the time it would be closed.
        for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
            if fd >= first and os.path.lexists(f"/proc/self/fd/{fd}"):
                os.close(fd)


def clear_environment(home: Path) -> None:
    """Empty the environment, and overwrite the strings that the process was started with.

    `os.environ.clear()` leaves those strings on the stack, where native code, or /proc/self/environ, finds them. HOME
    and TMPDIR are set again: without HOME, expanding "~" asks for the passwd file, which is not readable.

    What Python or a library copied to its heap before is still there.
    """
    os.environ.clear()
    libc().clearenv()
    # Fields 50 and 51 of proc(5): env_start, env_end. The second field may hold spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    if 0 < start < end:
        ctypes.memset(start, 0, end - start)
    os.environ["HOME"] = os.environ["TMPDIR"] = str(home)
    tempfile.tempdir = str(home)  # whatever the zygote found out before is not writable here
