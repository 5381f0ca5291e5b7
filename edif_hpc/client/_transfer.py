"""What there is to read of a result, in parts, and how much of each is there already.

The second is kept in a file beside the partial one, and outlives whoever reads.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._errors import ResultExpired

PART_BYTES = 8 * 1024 * 1024
"""Where the service names none. Object stores want ranges of 8 to 16 MB."""
NOTED_BYTES = 1024 * 1024
"""How much of a part is read until the file says so."""


@dataclass(frozen=True)
class Transfer:
    """What there is to read.

    Args:
        link: where, for now.
        size: bytes in all.
        part_bytes: bytes of each part but the last.
        digests: SHA-256 of each part, in hex; empty where the service gives none.
        form: the suffix of a file that torch did not write, and that `result` so cannot load; else empty.
    """

    link: str
    size: int
    part_bytes: int
    digests: tuple[str, ...]
    form: str = ""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Transfer:
        """What `GET /api/requests/{id}` says of a completed request.

        Raises:
            ResultExpired: it has no result any more.
        """
        given = record.get("transfer") or {}
        size = given.get("bytes", record.get("result_bytes"))
        if not record.get("result") or size is None:
            raise ResultExpired(f"The service keeps no result of request {record.get('id')} any more; run it again.")
        part_bytes, digests = int(given.get("part_bytes") or 0), tuple(given.get("digests") or ())
        if part_bytes < 1 or len(digests) != -(-int(size) // part_bytes):
            part_bytes, digests = PART_BYTES, ()
        form = record.get("form") or ""
        return cls(record["result"], int(size), part_bytes, digests, "" if form == "pt" else form)

    @property
    def parts(self) -> int:
        return -(-self.size // self.part_bytes)

    def span(self, part: int) -> tuple[int, int]:
        """First byte of a part, and the one after its last."""
        return part * self.part_bytes, min(self.size, (part + 1) * self.part_bytes)

    def length(self, part: int) -> int:
        start, end = self.span(part)
        return end - start


class State:
    """How much of each part is there, kept in a file."""

    def __init__(self, file: Path, about: dict[str, Any], there: dict[int, int] | None = None) -> None:
        self._file = file
        self._about = about
        self._lock = threading.Lock()
        self._there = there or {}
        self._noted = dict(self._there)

    @classmethod
    def recalled(cls, file: Path, request_id: str, transfer: Transfer) -> State:
        """What an earlier reading of the same result left; nothing where that was another's, or cannot be told."""
        about = {"request": request_id, "bytes": transfer.size, "part_bytes": transfer.part_bytes}
        try:
            found = json.loads(file.read_text())
            there = {int(part): int(length) for part, length in found.pop("there").items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(file, about)
        if found != about or not all(0 <= part < transfer.parts for part in there):
            return cls(file, about)
        lengths = {part: min(length, transfer.length(part)) for part, length in there.items()}
        if not transfer.digests:  # nobody would notice if a crash had lost the end of what was written
            lengths = {part: length for part, length in lengths.items() if length == transfer.length(part)}
        return cls(file, about, lengths)

    def of(self, part: int) -> int:
        """Bytes of a part, from its beginning, that are there."""
        return self._there.get(part, 0)

    @property
    def bytes(self) -> int:
        return sum(self._there.values())

    def note(self, part: int, length: int, *, whole: bool = False) -> None:
        """So much of a part has been written."""
        with self._lock:
            self._there[part] = length
            if not whole and 0 <= length - self._noted.get(part, 0) < NOTED_BYTES:
                return
            self._noted = dict(self._there)
            draft = beside(self._file, "new")
            draft.write_text(json.dumps({**self._about, "there": self._there}))
            draft.replace(self._file)


def beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")
