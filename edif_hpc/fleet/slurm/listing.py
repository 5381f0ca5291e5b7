"""What Slurm said last about a home's allocations: one question a minute for all pools, whoever asks.

The answer is kept in a file beside the orders, so that a fleet which is started again and again asks no more often. A
slurmctld that takes its time holds nobody up: the question is put in a thread, and while it hangs nothing is known.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.errors import EdifError
from edif_hpc.core.home import Home

from . import names, order
from .commands import Slurm
from .names import Name
from .text import Seen

ASK_EVERY_SECONDS = 60.0
HANGS_SECONDS = 10.0
"""From when on a question without an answer counts as silence: a squeue takes a second or two, also on large sites."""
FILE = "listing.json"

logger = log.get("fleet")
Run = Callable[[Callable[[], None]], None]


def at_once(work: Callable[[], None]) -> None:
    work()


def beside(work: Callable[[], None]) -> None:
    """In a thread of its own, which the end of the process does not wait for."""
    threading.Thread(target=work, name="squeue", daemon=True).start()


class Listing:
    """What is known of this home's allocations.

    Args:
        run: how the question is put, at once or beside what goes on.
    """

    def __init__(self, slurm: Slurm, home: Path, now: Callable[[], float] = time.time, run: Run = at_once) -> None:
        self.slurm = slurm
        self.home = home
        self.now = now
        self.asked = 0.0
        self.told = 0.0
        """When the question was put that `known` answers."""
        self._known: dict[Name, Seen] | None = None
        self._trouble = "Slurm has not been asked yet."
        self._run = run
        self._asking = False
        self._remember()

    @property
    def known(self) -> dict[Name, Seen] | None:
        """By name; None: nothing is known."""
        return None if self._hangs else self._known

    @property
    def trouble(self) -> str:
        """Why nothing is known; empty: it is."""
        return f"squeue has not answered for {self.now() - self.asked:.0f} s." if self._hangs else self._trouble

    @property
    def _hangs(self) -> bool:
        return self._asking and self.now() - self.asked > HANGS_SECONDS

    def refresh(self) -> None:
        """Ask again, if a minute has passed."""
        if self._asking or 0 <= self.now() - self.asked < ASK_EVERY_SECONDS:
            return
        self.asked, self._asking = self.now(), True
        self._run(self._ask)

    def forget(self) -> None:
        """Count as knowing nothing until Slurm is asked again."""
        self._known, self._trouble = None, "The last submission had no answer, and Slurm has not been asked since."

    def _ask(self) -> None:
        asked = self.asked
        try:
            seen = self.slurm.allocations()
        except EdifError as error:
            self._known, self._trouble = None, str(error)
            logger.warning("nothing is known of the allocations", error=str(error))
        else:
            self._take(seen, asked)
            self._keep(seen)
        finally:
            self._asking = False

    def _take(self, seen: list[Seen], asked: float) -> None:
        self._trouble, self.told = "", asked
        self._known = {name: each for each in seen if (name := names.read(each.name, self.home))}

    # -- the file ------------------------------------------------------------------------------------------------------

    def _keep(self, seen: list[Seen]) -> None:
        path = path_of(self.home)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        answer = {"asked": self.told, "seen": [asdict(each) for each in seen]}
        Home(self.home).write_private(path, json.dumps(answer))

    def _remember(self) -> None:
        """Take what a fleet before this one was told, while that is young."""
        try:
            kept = json.loads(path_of(self.home).read_text())
        except FileNotFoundError:
            return
        if 0 <= self.now() - kept["asked"] < ASK_EVERY_SECONDS:
            self.asked = kept["asked"]
            self._take([Seen(**each) for each in kept["seen"]], self.asked)


def path_of(home: Path) -> Path:
    return order.folder(home) / FILE


def forget_kept(home: Path) -> None:
    """Have the next fleet ask anew: somebody has ended allocations past the fleet."""
    path_of(home).unlink(missing_ok=True)
