"""Launching workers: the seam to Slurm and its local twin, which starts them as processes on this machine."""

from __future__ import annotations

import secrets
import subprocess
import time
from dataclasses import dataclass
from typing import Protocol

from edif_hpc.core.home import Home

from . import process
from .components import own_command, own_environment
from .decide import Launched
from .supervise import WORKER

WORDS = 300
"""Characters of a worker's last words that a sentence can hold."""


@dataclass(frozen=True)
class Ended:
    """A worker that is gone. `status` is None when nobody could see how; `cause` its last words.

    Args:
        cancelled: past this service, as far as its launcher knows.
        waited: the lineage in which it waited and did not begin; empty: it began, or is of none.
    """

    worker_id: str
    lived_seconds: float
    status: int | None
    cause: str
    cancelled: bool = False
    waited: str = ""


class Launcher(Protocol):
    """Three verbs over one pool. Workers report to Redis by themselves; this is only about their processes."""

    def launch(self) -> str:
        """Start one more worker and return its id."""

    def launched(self) -> list[Launched]:
        """Workers started here that have not ended, whichever fleet started them."""

    def ended(self) -> list[Ended]:
        """Workers that ended since the last call."""

    def pending(self) -> str:
        """Why what was launched has not started; "" when nothing waits."""

    def trouble(self) -> str:
        """Why nobody knows what runs; "" when it is known."""

    def halt(self) -> None:
        """Take back what was launched and has not started."""


class LocalLauncher:
    """Workers as processes with records in the home: a fleet that died leaves them to the next one."""

    def __init__(self, home: Home, pool: str) -> None:
        self.home = home
        self.pool = pool
        self._children: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def launch(self) -> str:
        worker_id = f"{WORKER}-{secrets.token_hex(3)}"
        command = own_command(self.home, "worker", "--id", worker_id, "--pool", self.pool)
        child = process.spawn(self.home, worker_id, command, environment=own_environment())
        self._children[worker_id] = (child, time.time())
        return worker_id

    def launched(self) -> list[Launched]:
        return [Launched(record.name, record.started) for record in self._records() if record.alive]

    def ended(self) -> list[Ended]:
        gone = []
        for worker_id, (child, started) in list(self._children.items()):
            if child.poll() is not None:
                gone.append(Ended(worker_id, time.time() - started, child.returncode, self._cause(worker_id, child)))
                del self._children[worker_id]
        for record in self._records():
            if not record.alive and record.name not in self._children:
                process.forget(self.home, record)
        return gone

    def pending(self) -> str:
        return ""  # a process starts at once

    def trouble(self) -> str:
        return ""

    def halt(self) -> None:
        return  # and so there is nothing to take back

    def _cause(self, worker_id: str, child: subprocess.Popen[bytes]) -> str:
        if child.returncode < 0:
            return f"killed by signal {-child.returncode}."
        return process.last_words(self.home, worker_id)[-WORDS:] or f"status {child.returncode}, without a word."

    def _records(self) -> list[process.Record]:
        return [r for r in process.records(self.home) if r.here and r.name.startswith(f"{WORKER}-")]
