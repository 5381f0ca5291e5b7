"""The batch host's end of the line to its worker; `core.errands` says what is spoken on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.core.errands import ANSWERS, ASKS, LONGEST, RECALL, SERVED, SUCCESSOR

FOLDER = "supervisor"
"""Within the allocation's scratch."""


@dataclass(frozen=True)
class Errand:
    """Something that a worker asked for, or noted."""

    verb: str
    generation: int


class Line:
    """The batch host's end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        for name in (ASKS, ANSWERS):
            os.mkfifo(folder / name, 0o600)
        self._asks = os.open(folder / ASKS, os.O_RDWR | os.O_NONBLOCK)
        self._answers = os.open(folder / ANSWERS, os.O_RDWR | os.O_NONBLOCK)
        self._half = b""

    def errands(self) -> Iterator[Errand]:
        """What was asked since the last call; what is no errand is passed over."""
        try:
            self._half += os.read(self._asks, LONGEST)
        except BlockingIOError:
            return
        *lines, half = self._half.split(b"\n")
        self._half = half[-LONGEST:]
        for line in lines:
            verb, _, number = line.decode(errors="replace").partition(" ")
            if verb in (SUCCESSOR, RECALL, SERVED) and number.isascii() and number.isdigit():
                yield Errand(verb, int(number))

    def answer(self, errand: Errand, words: str) -> None:
        """Say how an errand went. A worker that has stopped listening does not hold us up."""
        text = f"{errand.verb} {errand.generation} {' '.join(words.split())}"
        try:
            os.write(self._answers, text.encode()[: LONGEST - 1] + b"\n")
        except BlockingIOError:
            return  # the pipe is full of answers that nobody read

    def close(self) -> None:
        os.close(self._asks)
        os.close(self._answers)
