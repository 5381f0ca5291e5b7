"""The launcher of a Slurm pool: allocations instead of processes, with the three verbs of the local one.

What runs is what Slurm said last, at most once a minute, what this launcher submitted since, and what supervisors
report meanwhile. While Slurm is silent nothing is submitted and nothing is taken for ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.fleet import process
from edif_hpc.fleet.decide import ALLOCATIONS, Launched
from edif_hpc.fleet.local import WORDS, Ended

from . import names, order
from .commands import SlurmSilent, Unsure
from .listing import Listing
from .names import Name
from .submit import submit
from .text import Phase, Seen

LAG_SECONDS = 2.0
"""How long after a supervisor has ended Slurm may still call its allocation running."""
EXPECTED = frozenset({"CANCELLED", "COMPLETED", "PREEMPTED", "TIMEOUT"})
FAILED = frozenset({"BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
UNSEEN_SECONDS = 30.0
"""How long after its submission an allocation may be missing in a listing."""

logger = log.get("fleet")


@dataclass
class Submitted:
    """An allocation of this pool that has not been seen to end."""

    job_id: str
    since: float
    seen: Seen | None = None
    served: bool = False
    cancelled_at: float = -1.0
    """The listing in which it was pending when it was last taken back, by that listing's time."""

    @property
    def began(self) -> float | None:
        """When it began to run, if it did.

        Slurm names a start for others too: an estimate while one waits, its end when it was cancelled while it did. A
        node only what ran has.
        """
        ran = self.seen is not None and self.seen.phase is not Phase.PENDING and self.seen.nodes
        return self.seen.start if self.seen and ran else None

    def lived(self, now: float) -> float:
        """For how many seconds it ran, by what Slurm says; it may have ended long before anybody looked."""
        ended = self.seen.end if self.seen and self.seen.phase is Phase.ENDED else None
        return (ended or now) - (self.began or ended or now)


class SlurmLauncher:
    """Allocations of one pool. A launch may go on in one thread while another looks.

    Args:
        draft: what the allocation of a name is told.
        succeed: gets the generation after one that broke, as `succession.succeed`.
    """

    def __init__(
        self,
        home: Home,
        pool: Pool,
        listing: Listing,
        draft: Callable[[Name], order.Order],
        succeed: Callable[[order.Order, str], str | None],
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
        """Submit one more allocation, the successor of one that broke if there is such.

        Raises:
            SlurmSilent: nobody knows what runs, so it was not tried.
            ComponentError: Slurm refused, or did not tell what became of it.
        """
        if self.listing.known is None:
            raise SlurmSilent(self.listing.trouble)
        self.listing.submitting()
        try:
            name, job_id = self._continue() or self._begin()
        except Unsure:
            self.listing.forget("The last submission had no answer, and Slurm has not been asked since.")
            raise
        except SlurmSilent as error:  # before a lineage is continued it is looked for
            self.listing.forget(str(error))
            raise
        if name not in self._buried:
            self._submitted[name] = Submitted(job_id, self.listing.now())
        logger.info("allocation submitted", allocation=name.allocation, job=job_id)
        return name.worker

    def _continue(self) -> tuple[Name, str] | None:
        """The next generation of a lineage that broke and has not ended; "" for an allocation that somebody else is
        getting, and that Slurm will show."""
        while self._broken:
            broken, predecessor = next(reversed(self._broken.items()))
            try:
                job_id = self.succeed(self.draft(broken.next), predecessor)
            except SlurmSilent:
                raise  # so it was not tried, and will be
            except Exception:
                self._broken.pop(broken)
                raise
            self._broken.pop(broken)
            if job_id is not None:
                return broken.next, job_id
        return None

    def _begin(self) -> tuple[Name, str]:
        name = names.first(self.home.root, self.pool.name)
        return name, submit(self.home, self.draft(name), self.listing.slurm)

    def launched(self) -> list[Launched]:
        self._look()
        now = self.listing.now()
        return [Launched(name.worker, each.began or now, each.served) for name, each in list(self._submitted.items())]

    def ended(self) -> list[Ended]:
        self._look()
        gone = []
        for name, each in list(self._submitted.items()):
            report = order.read_report(self.home.root, name)
            if report:
                self._heed(name, report)
                each.served = report.served
            settled = report is not None and report.ended is not None
            if not settled and not self._has_gone(name, each):
                continue
            if report and report.ended and report.terminated and self.listing.told < report.ended + LAG_SECONDS:
                continue  # by whom is for Slurm to say
            del self._submitted[name]
            self._buried.add(name)
            gone.append(self._end(name, each, report))
        return gone

    def pending(self) -> str:
        reasons = {
            each.seen.reason
            for each in list(self._submitted.values())
            if each.seen and each.seen.phase is Phase.PENDING
        }
        return ", ".join(sorted(reasons - {"", "None"}))

    def trouble(self) -> str:
        return self.listing.trouble

    def halt(self) -> None:
        told = self.listing.told
        waiting = [
            each
            for each in list(self._submitted.values())
            if each.seen and each.seen.phase is Phase.PENDING and each.cancelled_at < told
        ]
        for each in waiting:
            each.cancelled_at = told
        self._cancelled.update(each.job_id for each in waiting)
        self.listing.slurm.cancel([each.job_id for each in waiting])

    def _look(self) -> None:
        self.listing.refresh()
        known = self.listing.known or {}
        if known:
            self._buried &= known.keys()
        for name, seen in known.items():
            if name.pool != self.pool.name or name in self._buried:
                continue
            if name not in self._submitted and seen.phase is not Phase.ENDED:  # a fleet before this one did
                running = seen.phase is not Phase.PENDING  # else its start is Slurm's estimate, in days perhaps
                since = (seen.start if running else None) or self.listing.now()
                self._submitted[name] = Submitted(seen.job_id, since)
            if each := self._submitted.get(name):
                each.seen, each.job_id = seen, each.job_id or seen.job_id

    def _heed(self, name: Name, report: order.Report) -> None:
        """Take up what a supervisor submitted by itself, and remember what it took back."""
        if report.recalled:
            self._cancelled.add(report.recalled)
        elif report.successor and name.next not in self._buried and name.next not in self._submitted:
            self._submitted[name.next] = Submitted(report.successor, self.listing.now())

    def _has_gone(self, name: Name, each: Submitted) -> bool:
        """Whether Slurm, asked since, says that it ended or does not know it any more."""
        if self.listing.known is None or self.listing.told < each.since + UNSEEN_SECONDS:
            return False
        seen = self.listing.known.get(name)
        return seen is None or seen.phase is Phase.ENDED

    def _end(self, name: Name, each: Submitted, report: order.Report | None) -> Ended:
        state = each.seen.state if each.seen else ""
        if report and report.ended is not None:
            # One that never served died young, however long its workers tried.
            lived, status, cause = report.longest if report.served else 0.0, report.status, report.cause
        else:
            now = self.listing.now()
            lived = now - report.started if report else each.lived(now)
            status = 1 if state in FAILED or (report is None and state not in EXPECTED and each.job_id) else None
            words = process.last_words(self.home, name.worker) or _end_of(self._log(each))
            said = f"Slurm says {state}" if state else "Slurm does not know it any more"
            cause = f"{said}; its last words: {words or 'none'}"
        cancelled = state == "CANCELLED" and each.job_id not in self._cancelled
        if status and not cancelled and lived > ALLOCATIONS.young_seconds and name.next not in self._submitted:
            self._broken[name] = each.job_id
        waiting = name.lineage if report is None and each.began is None else ""
        return Ended(name.worker, lived, None if cancelled else status, cause[-WORDS:], cancelled, waiting)

    def _log(self, each: Submitted) -> Path:
        return order.folder(self.home.root) / f"{each.job_id}_0_log.out"


def _end_of(path: Path) -> str:
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""
