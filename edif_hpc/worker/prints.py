"""What a block prints, as log lines that leave while it runs, and never more than its limits allow."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

from edif_hpc.worker.messages import cut_line

REWRITTEN_SECONDS = 10.0
"""How often a line that is written over and over, as progress bars are, is handed on as it stands."""


class LineWriter(io.TextIOBase):
    """A text stream that hands on whole lines. Safe for several threads.

    What a carriage return takes back on a terminal is dropped, but for a look at it now and then.
    """

    def __init__(self, emit: Callable[[str], None], max_lines: int, line_bytes: int) -> None:
        self._emit = emit
        self._left = max_lines
        self._line_bytes = line_bytes
        self._partial = ""
        self._looked = time.monotonic()
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
                    self._line(_last(line))
            elif "\r" in text:
                self._rewrite(text)
            elif len(self._partial) <= self._line_bytes:  # the rest of an endless line is cut anyway
                self._partial += text
        return len(text)

    def finish(self) -> None:
        """Hand on what was printed without a newline at the end."""
        with self._lock:
            if self._partial:
                self._line(_last(self._partial))
            self._partial = ""

    def _rewrite(self, text: str) -> None:
        """Keep what stands on the line now; before it is gone, show it if nothing was shown for a while."""
        before, _, after = (self._partial + text).rpartition("\r")
        shown = _last(before)
        if shown.strip() and time.monotonic() - self._looked >= REWRITTEN_SECONDS:
            self._looked = time.monotonic()
            self._line(shown)
            shown = ""
        self._partial = f"{shown}\r{after}"  # a return at the end takes nothing back until something is written

    def _line(self, line: str) -> None:
        if self._left < 0:
            return
        if self._left == 0:
            line = "... (further lines were dropped: the request printed more than its limit)"
        self._left -= 1
        self._emit(cut_line(line, self._line_bytes))


def _last(line: str) -> str:
    """What a terminal would show of a line that carriage returns begin anew."""
    return next((part for part in reversed(line.split("\r")) if part), "")
