"""What a supervisor does for its worker with Slurm's commands: submit the successor, take it back.

They may wait for a busy slurmctld, so they run in a thread, one after the other, while signals go on being passed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from redis.exceptions import RedisError

from edif_hpc.core import log
from edif_hpc.core.endpoints import Role, redis_endpoint
from edif_hpc.core.errands import DONE, RECALL, REFUSED, SERVED, SUBMITTED
from edif_hpc.core.errors import ComponentError, EdifError
from edif_hpc.core.home import Home
from edif_hpc.fleet.state import settings_of

from . import succession
from .commands import Slurm
from .draft import successor_of
from .line import Errand, Line
from .order import Order, Report

logger = log.get("supervisor")


class Errands:
    """What one allocation gets done.

    Args:
        note: called when the report has changed.
    """

    def __init__(self, order: Order, slurm: Slurm, report: Report, note: Callable[[], None]) -> None:
        self.order = order
        self.home = Home(order.home)
        self.report = report
        self.note = note
        self._slurm = slurm
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._running: dict[Errand, Future[str]] = {}

    def poll(self, line: Line) -> None:
        """Take what was asked, and answer what is done."""
        for errand in line.errands():
            if errand.verb == SERVED:
                self.report.served = True
                self.note()
            elif errand not in self._running:
                self._running[errand] = self._thread.submit(self._run, errand)
        for errand, future in list(self._running.items()):
            if future.done():
                del self._running[errand]
                line.answer(errand, _words(errand, future))

    def succeed_alone(self) -> None:
        """Ask for the successor without a worker, which has died for good."""
        try:
            successor = successor_of(self.order)
            endpoint = redis_endpoint(self.home, settings_of(self.home, self.order.config).settings, Role.WORKER)
            self._found(succession.succeed(self.home, endpoint, successor, self._slurm, self.report.job_id))
        except (EdifError, RedisError, OSError) as error:
            logger.error("no successor", error=succession.reason(error))

    def close(self) -> None:
        """Wait for what is under way: an allocation that is being submitted must be known."""
        self._thread.shutdown(wait=True)
        for errand, future in self._running.items():
            logger.info("errand ended unheard", errand=errand.verb, words=_words(errand, future))

    def _run(self, errand: Errand) -> str:
        successor = successor_of(self.order)
        if errand.generation != successor.generation:
            raise ComponentError(f"Generation {self.order.generation} has no other errand than for the next.")
        if errand.verb == RECALL:
            self.report.recalled = self.report.successor  # before it is true: whoever sees it gone must know by whom
            self.note()
            succession.recall(successor, self._slurm)
            return ""
        dependency = succession.dependency_of(successor, self.report.job_id)
        job_id = succession.submit_once(self.home, successor, self._slurm, dependency)
        self._found(job_id)
        return job_id

    def _found(self, job_id: str | None) -> None:
        if job_id:
            self.report.successor = job_id
            self.note()
            logger.info("successor", generation=self.order.generation + 1, job=job_id)


def _words(errand: Errand, future: Future[str]) -> str:
    if error := future.exception():
        logger.error("errand failed", errand=errand.verb, error=str(error))
        return f"{REFUSED} {succession.reason(error)}"
    return DONE if errand.verb == RECALL else f"{SUBMITTED} {future.result()}"
