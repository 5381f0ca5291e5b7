"""The launcher of a Slurm pool: allocations instead of processes, with the three verbs of the local one.

What runs is what Slurm said last, at most once a minute, what this launcher submitted since, and what supervisors
report meanwhile. While Slurm is silent nothing is submitted and nothing is taken for ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.errors import ComponentError, EdifError
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.fleet import process
from edif_hpc.fleet.decide import ALLOCATIONS, Launched
from edif_hpc.fleet.local import WORDS, Ended

from . import names, order
from .commands import Slurm
from .names import Name
from .submit import submit
from .text import Phase, Seen

ASK_EVERY_SECONDS = 60.0
LAG_SECONDS = 2.0
"""How long after a supervisor has ended Slurm may still call its allocation running."""
EXPECTED = frozenset({"CANCELLED", "COMPLETED", "PREEMPTED", "TIMEOUT"})
FAILED = frozenset({"BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
UNSEEN_SECONDS = 30.0
"""How long after its submission an allocation may be missing in a listing."""

logger = log.get("fleet")


class Listing:
    """What Slurm said last about this home's allocations, shared by all pools so that one question serves them all."""

    def __init__(self, slurm: Slurm, home: Path, now: Callable[[], float] = time.time) -> None:
        self.slurm = slurm
        self.home = home
        self.now = now
        self.asked = 0.0
        self.known: dict[Name, Seen] | None = None
        self.trouble = "Slurm has not been asked yet."

    def refresh(self) -> None:
        """Ask again, if a minute has passed."""
        if self.now() - self.asked < ASK_EVERY_SECONDS:
            return
        self.asked = self.now()
        try:
            seen = self.slurm.allocations()
        except EdifError as error:
            self.known, self.trouble = None, str(error)
            logger.warning("nothing is known of the allocations", error=str(error))
            return
        self.trouble = ""
        self.known = {name: each for each in seen if (name := names.read(each.name, self.home))}

    def forget(self) -> None:
        """Count as knowing nothing until Slurm is asked again."""
        self.known, self.trouble = None, "The last submission failed, and Slurm has not been asked since."


@dataclass
class Submitted:
    """An allocation of this pool that has not been seen to end."""

    job_id: str
    since: float
    seen: Seen | None = None

    @property
    def began(self) -> float | None:
        """When it began to run, if it did; for a pending one Slurm names an estimate."""
        running = self.seen is not None and self.seen.phase is not Phase.PENDING
        return self.seen.start if self.seen and running else None


class SlurmLauncher:
    """Allocations of one pool.

    Args:
        draft: what the allocation of a name is told.
        succeed: gets the next generation of a lineage that broke, as `succession.succeed`.
    """

    def __init__(
        self,
        home: Home,
        pool: Pool,
        listing: Listing,
        draft: Callable[[Name], order.Order],
        succeed: Callable[[order.Order, str], str],
    ) -> None:
        self.home = home
        self.pool = pool
        self.listing = listing
        self.draft = draft
        self.succeed = succeed
        self._submitted: dict[Name, Submitted] = {}
        self._cancelled: set[str] = set()
        self._buried: set[Name] = set()
        """Told to have ended; the last listing may still call them running."""
        self._broken: dict[Name, str] = {}
        """Lost without a successor, and their allocations: the next launches continue their lineages."""

    def launch(self) -> str:
        """Submit one more allocation.

        Raises:
            ComponentError: Slurm refused, or nobody knows what runs.
        """
        if self.listing.known is None:
            raise ComponentError(self.listing.trouble)
        name = names.first(self.home.root, self.pool.name)
        try:
            if self._broken:
                broken, predecessor = self._broken.popitem()
                name = broken.next
                job_id = self.succeed(
                    self.draft(name), predecessor
                )  # "": somebody else is at it, and Slurm will show it
            else:
                job_id = submit(self.home, self.draft(name), self.listing.slurm)
        except ComponentError:
            self.listing.forget()  # it may exist all the same
            raise
        self._submitted[name] = Submitted(job_id, self.listing.now())
        logger.info("allocation submitted", allocation=name.allocation, job=job_id)
        return name.worker

    def launched(self) -> list[Launched]:
        self._look()
        now = self.listing.now()
        return [Launched(name.worker, each.began or now) for name, each in self._submitted.items()]

    def ended(self) -> list[Ended]:
        self._look()
        gone = []
        for name, each in list(self._submitted.items()):
            report = order.read_report(self.home.root, name)
            if report:
                self._heed(name, report)
            settled = report is not None and report.ended is not None
            if not settled and not self._has_gone(name, each):
                continue
            if report and report.ended and report.terminated and self.listing.asked < report.ended + LAG_SECONDS:
                continue  # by whom is for Slurm to say
            del self._submitted[name]
            self._buried.add(name)
            gone.append(self._end(name, each, report))
        return gone

    def pending(self) -> str:
        reasons = {
            each.seen.reason for each in self._submitted.values() if each.seen and each.seen.phase is Phase.PENDING
        }
        return ", ".join(sorted(reasons - {"", "None"}))

    def trouble(self) -> str:
        return self.listing.trouble

    def halt(self) -> None:
        seen = [each.seen for each in self._submitted.values() if each.seen]
        waiting = [each.job_id for each in seen if each.phase is Phase.PENDING]
        self._cancelled.update(waiting)
        self.listing.slurm.cancel(waiting)

    def _look(self) -> None:
        self.listing.refresh()
        known = self.listing.known or {}
        if known:
            self._buried &= known.keys()
        for name, seen in known.items():
            if name.pool != self.pool.name or name in self._buried:
                continue
            if name not in self._submitted and seen.phase is not Phase.ENDED:  # a fleet before this one did
                self._submitted[name] = Submitted(seen.job_id, seen.start or self.listing.now())
            if name in self._submitted:
                self._submitted[name].seen = seen

    def _heed(self, name: Name, report: order.Report) -> None:
        """Take up what a supervisor submitted by itself, and remember what it took back."""
        if report.recalled:
            self._cancelled.add(report.recalled)
        elif report.successor and name.next not in self._buried and name.next not in self._submitted:
            self._submitted[name.next] = Submitted(report.successor, self.listing.now())

    def _has_gone(self, name: Name, each: Submitted) -> bool:
        """Whether Slurm, asked since, says that it ended or does not know it any more."""
        if self.listing.known is None or self.listing.asked < each.since + UNSEEN_SECONDS:
            return False
        seen = self.listing.known.get(name)
        return seen is None or seen.phase is Phase.ENDED

    def _end(self, name: Name, each: Submitted, report: order.Report | None) -> Ended:
        state = each.seen.state if each.seen else ""
        if report and report.ended is not None:
            # One that never served died young, however long its workers tried.
            lived, status, cause = report.longest if report.served else 0.0, report.status, report.cause
        else:
            lived = self.listing.now() - (report.started if report else each.began or self.listing.now())
            status = 1 if state in FAILED or (report is None and state not in EXPECTED) else None
            words = process.last_words(self.home, name.worker) or _end_of(self._log(each))
            said = f"Slurm says {state}" if state else "Slurm does not know it any more"
            cause = f"{said}; its last words: {words or 'none'}"
        cancelled = state == "CANCELLED" and each.job_id not in self._cancelled
        if status and not cancelled and lived > ALLOCATIONS.young_seconds and name.next not in self._submitted:
            self._broken[name] = each.job_id
        return Ended(name.worker, lived, None if cancelled else status, cause[-WORDS:], cancelled)

    def _log(self, each: Submitted) -> Path:
        return order.folder(self.home.root) / f"{each.job_id}_0_log.out"


def _end_of(path: Path) -> str:
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""
