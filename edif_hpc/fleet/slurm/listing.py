"""What Slurm said last about a home's allocations: one question a minute for all pools, whoever asks.

When it was asked and what it said are kept in a file beside the orders, so that a fleet which is started again and
again asks no more often. A slurmctld that takes its time holds nobody up: the question is put in a thread, and while it
hangs nothing is known.
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
        self._lock = threading.Lock()
        self._submitted = 0.0
        """When the last submission began: no answer to a question from before tells of it."""
        self._doubted = 0.0
        """When one was made that nobody knows the outcome of."""
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
        with self._lock:
            self.asked, self._asking = self.now(), True
            self._keep(None)  # before there is an answer: a fleet that is killed while Slurm hangs has asked as well
        self._run(self._ask)

    def submitting(self) -> None:
        """Note that an allocation is being submitted: a fleet after this one may not go by what was known before."""
        with self._lock:
            self._submitted = self.now()
            self._keep(None)

    def forget(self, trouble: str) -> None:
        """Count as knowing nothing until Slurm is asked again: an answer that is under way is one from before."""
        with self._lock:
            self._doubted = self.now()
            self._known, self._trouble = None, trouble

    def _ask(self) -> None:
        try:
            seen = self.slurm.allocations()
        except (EdifError, OSError) as error:
            with self._lock:
                self._known, self._trouble = None, str(error)
            logger.warning("nothing is known of the allocations", error=str(error))
        else:
            with self._lock:
                if self.asked > self._doubted:
                    self._take(seen)
                if self.asked > max(self._doubted, self._submitted):
                    self._keep(seen)
        finally:
            self._asking = False

    def _take(self, seen: list[Seen]) -> None:
        self._trouble, self.told = "", self.asked
        self._known = {name: each for each in seen if (name := names.read(each.name, self.home))}

    # -- the file ------------------------------------------------------------------------------------------------------

    def _keep(self, seen: list[Seen] | None) -> None:
        path = path_of(self.home)
        kept = {"asked": self.asked, "seen": None if seen is None else [asdict(each) for each in seen]}
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            Home(self.home).write_private(path, json.dumps(kept))
        except OSError as error:  # a full disk is no reason to know nothing
            logger.warning("when slurm was asked is not kept", error=str(error))

    def _remember(self) -> None:
        """Take what a fleet before this one was told, while that is young."""
        try:
            kept = json.loads(path_of(self.home).read_text())
            asked, told = float(kept["asked"]), kept["seen"]
            seen = None if told is None else [Seen(**each) for each in told]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:  # of another version, or damaged
            logger.warning("what slurm said before cannot be read", path=str(path_of(self.home)), error=str(error))
            return
        if not 0 <= self.now() - asked < ASK_EVERY_SECONDS:
            return
        self.asked = asked
        if seen is None:
            self._trouble = "A fleet before this one asked Slurm within the last minute; it is asked again after that."
        else:
            self._take(seen)


def path_of(home: Path) -> Path:
    return order.folder(home) / FILE


def forget_kept(home: Path) -> None:
    """Have the next fleet ask anew: somebody has ended allocations past the fleet."""
    path_of(home).unlink(missing_ok=True)
