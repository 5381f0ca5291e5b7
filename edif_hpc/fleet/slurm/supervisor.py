"""The supervisor: the thin process on the batch host that starts the worker, in its container, and sees it through.

It is what submitit calls, and needs no torch. It knows the deadline, passes signals on, restarts a worker that
crashed while there is time, gets the successor when the worker asks, and leaves a report. Slurm kills its step at the
end, so the report is kept up to date.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edif_hpc.core import log, walltime
from edif_hpc.core.endpoints import RedisEndpoint, Role, redis_endpoint
from edif_hpc.core.errors import EdifError
from edif_hpc.core.home import Home
from edif_hpc.core.scratch import scratch
from edif_hpc.fleet import process
from edif_hpc.fleet.state import settings_of

from . import container
from .books import Books
from .commands import Slurm
from .errands import Errands
from .line import FOLDER, Line
from .order import Order, Report, read_order, write_report

PAUSES = (1.0, 5.0, 15.0)
"""Seconds before a worker that crashed is started again; one that crashes once more ends the allocation."""
STEADY_SECONDS = 300.0
"""A worker that lived this long is forgiven its earlier crashes."""
END_SECONDS = 45.0
"""How long a worker may take to end that was told to without a reason of the clock's."""
LAST_SECONDS = 5.0
"""Before its deadline a worker that uploads still is killed, so that a report can be written."""
POLL_SECONDS = 0.2
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
NOTHING_LEFT_SECONDS = 30.0
"""With less left than this no worker is started again."""
YOUNG_SECONDS = 60.0
"""A generation whose workers died before this age, or never served, has no successor: that one would die as well."""

SCRATCH = "edif-hpc-"
"""How the names of allocations' scratch folders begin; with weights in them they are too large to be left behind."""

logger = log.get("supervisor")


def supervise(order_path: str) -> None:
    """Run one allocation to its end. The argument is all that submitit pickles.

    Raises:
        SystemExit: with the worker's status, so that Slurm shows it.
    """
    log.configure("supervisor", "info")
    order = read_order(Path(order_path))
    sys.exit(Supervisor(order, os.environ.get("SLURM_JOB_ID", "")).run())


class Supervisor:
    def __init__(self, order: Order, job_id: str) -> None:
        self.order = order
        self.home = Home(order.home)
        self.report = Report(job_id=job_id, host=socket.gethostname(), started=time.time())
        self.deadline = self.report.started + order.pool.walltime_seconds
        self.books = Books(self._endpoint)
        self.slurm = Slurm(order.slurm, self.books.count)
        self.errands = Errands(order, self.slurm, self.report, self._write)
        self._signals: list[tuple[float, signal.Signals]] = []
        self._told = False
        self._can_start = True

    def run(self) -> int:
        for number in PASSED_ON:
            signal.signal(number, self._take)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)  # Slurm sends it along with others
        self.deadline = self._find_deadline()
        self._write()
        with scratch(Path(tempfile.gettempdir()), SCRATCH, f"{self.report.job_id}-") as folder:
            for name in container.CACHES.values():
                (folder / name).mkdir()
            for path in container.covered(self.order, folder) if self.order.pool.image else ():
                path.mkdir(parents=True, exist_ok=True)
            line = Line(folder / FOLDER)
            status = self._keep_running(folder, line)
            if status and not self._told and self.report.served and self.report.longest > YOUNG_SECONDS:
                self.errands.succeed_alone()
            self.errands.close()
            line.close()
        self.report.ended, self.report.status = time.time(), status
        self._write()
        self.books.close()
        logger.info("ended", status=status, cause=self.report.cause, restarts=self.report.restarts)
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)  # else an interpreter that ends would still die of one
        return status

    def _endpoint(self) -> RedisEndpoint:
        return redis_endpoint(self.home, settings_of(self.home, self.order.config).settings, Role.WORKER)

    def _find_deadline(self) -> float:
        """Slurm's word, else the batch host's question to it, else the pool's walltime from now on."""
        found = walltime.from_environment(os.environ)
        if found is None and self.report.job_id:
            try:
                seen = self.slurm.allocation(self.report.job_id)
                found = seen.end if seen else None
            except EdifError as error:
                logger.warning("slurm does not tell the deadline", error=str(error))
        return found or self.deadline

    # -- the worker ----------------------------------------------------------------------------------------------------

    def _keep_running(self, folder: Path, line: Line) -> int:
        crashes = 0
        while True:
            began = time.monotonic()
            status = self._run_worker(folder, line)
            lived = time.monotonic() - began
            self.report.longest = max(self.report.longest, lived)
            if status == 0 or self._told:
                return status
            if not self._can_start:
                return status
            crashes = 1 if lived > STEADY_SECONDS else crashes + 1
            logger.error("worker ended early", status=status, lived=round(lived, 1), cause=self.report.cause)
            if crashes > len(PAUSES) or time.time() + PAUSES[crashes - 1] + NOTHING_LEFT_SECONDS > self.deadline:
                return status
            self.report.restarts += 1
            self._write()
            if not self._wait(PAUSES[crashes - 1]):
                return status

    def _run_worker(self, folder: Path, line: Line) -> int:
        """Start the worker, pass signals on, and return its status; negative: the signal that killed it."""
        command = container.command(self.order, folder, self.deadline, os.environ)
        logger.info("starting the worker", command=command, deadline=self.deadline)
        bare = not self.order.pool.image
        environment = container.bare_environment(self.order, folder, os.environ) if bare else None
        worker = self.order.name.worker
        with (self.home.logs / f"{worker}.log").open("ab") as words:
            try:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=environment, cwd="/",
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.report.cause = f"{command[0]} could not be started on {self.report.host}: {error.strerror}"
                self._can_start = False
                return 1
            status = self._see_through(child, line)
        if status < 0:
            self.report.cause = f"killed by signal {-status}"
        elif status:
            self.report.cause = process.last_words(self.home, worker) or f"status {status}, without a word"
        return status

    def _see_through(self, child: subprocess.Popen[bytes], line: Line) -> int:
        kill_at = float("inf")
        while True:
            try:
                return child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            self.errands.poll(line)
            for number in self._due_signals():
                child.send_signal(number)
                kill_at = min(kill_at, self._end_of(number))
            if time.time() > kill_at:
                child.kill()

    def _end_of(self, number: signal.Signals) -> float:
        """When a worker is killed that was sent this: what the walltime ends may upload until it is over."""
        now = time.time()
        return max(now, self.deadline - LAST_SECONDS) if number is signal.SIGUSR2 else now + END_SECONDS

    def _due_signals(self) -> list[signal.Signals]:
        """Those that are to be passed on now; Slurm's warning waits for its time."""
        now, warning = time.time(), walltime.warning_seconds(self.order.pool.walltime_seconds)
        due = [
            (at, number)
            for at, number in self._signals
            if number is not signal.SIGUSR2 or walltime.drain_at(at, self.deadline, warning) <= now
        ]
        for taken in due:
            self._signals.remove(taken)
        self._told = self._told or bool(due)
        self.report.terminated |= any(number is signal.SIGTERM for _, number in due)
        return [number for _, number in due]

    def _take(self, number: int, _: object) -> None:
        self._signals.append((time.time(), signal.Signals(number)))

    def _wait(self, seconds: float) -> bool:
        """Whether the whole time has passed without a signal."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._due_signals():
            time.sleep(POLL_SECONDS)  # a signal handler only notes; nothing else happens meanwhile
        return not self._told

    def _write(self) -> None:
        write_report(self.order.home, self.order.name, self.report)
