"""Scratch folders that go away with their owner, even with one that was killed.

The owner holds a lock on a file in its folder, which the kernel drops when the process is gone, however it went.
Whoever makes a scratch folder removes what dead owners left beside it. Where the file system has no locks, the folder
bears no such file and is never taken for abandoned.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWNER = ".owner"
"""Locked by the owner; holds the name of its machine, for some shared file systems lock within one machine alone."""
NAME_BYTES = 256


@contextmanager
def scratch(root: Path, kind: str, name: str = "") -> Iterator[Path]:
    """A folder of this process's own in `root`, gone afterwards. Its name begins with `kind`, then `name`.

    Abandoned folders of the same kind and user are removed first.
    """
    for other in root.glob(f"{kind}*"):
        if _abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}{name}", dir=root))
    held = _own(folder)
    try:
        yield folder
    finally:
        if held is not None:
            os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


def _own(folder: Path) -> int | None:
    """Lock a folder's file, and only then give it its name: no other process ever finds it unlocked."""
    draft = folder / f"{OWNER}.draft"
    held = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some parallel file systems are mounted without locks
        os.close(held)
        draft.unlink()
        return None
    os.write(held, socket.gethostname().encode())
    draft.rename(folder / OWNER)
    return held


def _abandoned(folder: Path) -> bool:
    """Whether this user's process on this machine owned the folder and is gone."""
    try:
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return False
        found = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(found, NAME_BYTES) == socket.gethostname().encode()
    except OSError:  # locked: the owner lives
        return False
    finally:
        os.close(found)
