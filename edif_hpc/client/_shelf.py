"""Where results lie on the user's machine while they are read, and afterwards when they are mapped into memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

KEPT_SECONDS = 7 * 86400.0
"""After its last use. A file that is mapped when it goes stays readable for whoever has mapped it."""


def folder() -> Path:
    """`edif-hpc/results` in the user's cache: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edif-hpc" / "results"


def place(request_id: str) -> Path:
    """Where the result of a request belongs."""
    return folder() / f"{request_id}.pt"


def touch(path: Path) -> None:
    path.touch()


def prepare() -> None:
    """Make the folder, for this user alone, and clear what nobody used for a week."""
    there = folder()
    there.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in there.iterdir():
        try:
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another process cleared it
            continue
