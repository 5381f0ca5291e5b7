"""Files that are there whole or not at all: written beside their place and put there at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole(target: Path) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `target` when the block ends well; otherwise nothing is left of it, and what was
    there before still is.

    Raises:
        OSError: there is no such folder, or it cannot be written to.
    """
    place = target.resolve()
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
