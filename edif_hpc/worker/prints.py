"""What a block prints, as log lines that leave while it runs, and never more than its limits allow."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

from edif_hpc.worker.messages import cut_line


class LineWriter(io.TextIOBase):
    """A text stream that hands on whole lines. Safe for several threads."""

    def __init__(self, emit: Callable[[str], None], max_lines: int, line_bytes: int) -> None:
        self._emit = emit
        self._left = max_lines
        self._line_bytes = line_bytes
        self._partial = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with self._lock:
            if "\n" in text:
                *lines, self._partial = (self._partial + text).split("\n")
                for line in lines:
                    self._line(line)
            elif len(self._partial) <= self._line_bytes:  # the rest of an endless line is cut anyway
                self._partial += text
        return len(text)

    def finish(self) -> None:
        """Hand on what was printed without a newline at the end."""
        with self._lock:
            if self._partial:
                self._line(self._partial)
            self._partial = ""

    def _line(self, line: str) -> None:
        if self._left < 0:
            return
        if self._left == 0:
            line = "... (further lines were dropped: the request printed more than its limit)"
        self._left -= 1
        self._emit(cut_line(line.removesuffix("\r"), self._line_bytes))
