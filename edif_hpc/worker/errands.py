"""The worker's end of the line to its supervisor; `core.errands` says what is spoken on it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.errands import ANSWERS, ASKS, LONGEST, REFUSED, Verb
from edif_hpc.core.errors import ComponentError

logger = log.get("worker")

ANSWER_SECONDS = 200.0
"""A busy slurmctld is waited for twice: by a look, and by a submission."""


class Supervisor:
    """Whoever watches over this worker on the batch host."""

    def __init__(self, folder: Path) -> None:
        try:
            self._asks = os.open(folder / ASKS, os.O_RDWR | os.O_NONBLOCK)
            self._answers = os.open(folder / ANSWERS, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise ComponentError(f"There is no line to a supervisor in {folder}: {error.strerror}.") from error
        self._half = b""

    async def ask(self, verb: Verb, generation: int) -> str:
        """Have something done. Returns what was said beyond that it was.

        Raises:
            ComponentError: it was refused, or nobody answered.
        """
        self._read()  # what came late to somebody before
        try:
            os.write(self._asks, f"{verb} {generation}\n".encode())
        except BlockingIOError:
            raise ComponentError("The supervisor reads nothing.") from None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                said = await self._answer(f"{verb} {generation} ")
        except TimeoutError:
            raise ComponentError(f"The supervisor said nothing for {ANSWER_SECONDS:.0f} s.") from None
        word, _, rest = said.partition(" ")
        if word == REFUSED:
            raise ComponentError(rest)
        return rest

    def note(self, verb: Verb, generation: int) -> None:
        """Say something to which nobody answers."""
        try:
            os.write(self._asks, f"{verb} {generation}\n".encode())
        except BlockingIOError:
            logger.warning("the supervisor reads nothing", unheard=verb)

    async def _answer(self, beginning: str) -> str:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._answers, readable.set)
        try:
            while True:
                for line in self._read():
                    if line.startswith(beginning):
                        return line.removeprefix(beginning)
                readable.clear()
                await readable.wait()
        finally:
            loop.remove_reader(self._answers)

    def _read(self) -> list[str]:
        try:
            self._half += os.read(self._answers, LONGEST)
        except BlockingIOError:
            return []
        *lines, self._half = self._half.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        os.close(self._asks)
        os.close(self._answers)
