"""One claim, from its payload to its terminal status.

The result is uploaded before COMPLETED is written, and everything written carries the claim's token. When Redis is
away the attempt waits with its result in hand; when the store is, with its result on local disk, its lease kept, and
its place at the model free for others. When the lease is lost it kills what runs and says nothing more.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from edif_hpc.core import log
from edif_hpc.core.errors import EdifError, HostError, LeaseLost, Unavailable
from edif_hpc.core.queue import Claim, Queue, Release, Step
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store, in_daemon, result_key
from edif_hpc.core.wire import Kind, ResultFormat, Status

from . import digests
from .contract import Limits, Outcome, ResultFile, RunSpec, Verdict
from .residents import Resident
from .spool import Spool
from .steady import AWAY, until_done

T = TypeVar("T")

GATHER_SECONDS = 0.02
"""How long events wait for others before they are written: less than anybody sees, longer than a short run."""
BATCH = 500
ORPHAN_SECONDS = 3600.0
"""How much longer than its upload may take an object is left alone that no request names."""

WAITS = "The object store is away: your result is kept on its worker and stored when it is back."
NOT_STORED = "the object store was away when its worker had to end"

logger = log.get("worker")


class Interrupted(Exception):
    """Somebody ends the attempt while it waits for the object store."""


class Attempt:
    """Runs one claim on a resident model, with others beside it if it needs several.

    Args:
        residents: the models; it runs at the first one's host.
        spool: where its result may wait for the object store.
        on_waiting: called once when it does, and so needs the model no more.
    """

    def __init__(
        self,
        claim: Claim,
        residents: Sequence[Resident],
        queue: Queue,
        store: Store,
        settings: Settings,
        spool: Spool,
        on_waiting: Callable[[Attempt], None],
        *,
        ahead: bool = False,
    ) -> None:
        self.claim = claim
        self.spool = spool
        self.on_waiting = on_waiting
        self.holds_place = True
        """Whether it counts among those that the model runs."""
        self.ahead = ahead
        """Claimed while another one ran, so that nothing waits between the two."""
        self.residents = tuple(residents)
        self.queue = queue
        self.store = store
        self.settings = settings
        self.started = False
        self.claimed = time.monotonic()
        self.run_id = f"{claim.request_id}:{claim.attempt}"
        self.cancelled: str | None = None
        self.handed_back: Release | None = None
        self._why_back = ""
        self.lease_lost = False
        self._stop = asyncio.Event()
        self._ended = False
        """Whether its code has run: what is left is to deliver the result."""
        self._sequence = 0
        self._unwritten: list[Step] = []
        self._news = asyncio.Event()

    # -- from outside ------------------------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """The owner or an admin wants it ended."""
        self.cancelled = reason
        self._stop.set()
        self._kill()

    def lose(self) -> None:
        """The request is somebody else's now."""
        self.lease_lost = True
        self._stop.set()
        self._kill()

    def hand_back(self, reason: Release, why: str = "its worker is ending") -> None:
        """Somebody else shall run it; a result that is on its way to the store goes on."""
        self.handed_back, self._why_back = reason, why
        if not self._ended:
            self._stop.set()
        self._kill()

    def abandon(self) -> None:
        """There is no time left to wait for the object store."""
        self._stop.set()

    def _kill(self) -> None:
        if host := self.residents[0].host:
            host.cancel(self.run_id)

    # -- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> Outcome | None:
        """Serve the claim to its end. Returns the outcome, or None when it went to somebody else."""
        writer = asyncio.create_task(self._write_steps())
        outcome: Outcome | None = None
        try:
            outcome = await self._execute()
            self._ended = True
            await self._settle(outcome)
        except LeaseLost:
            logger.warning("lease lost", request=self.claim.request_id, attempt=self.claim.attempt)
            return None
        except EdifError as error:
            outcome = Outcome(Verdict.FAILED, str(error))
            await self._finish_error(str(error), {})
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)  # what it could not write, the end has written or lost
            if outcome and outcome.result:
                outcome.result.close()
        return outcome

    @property
    def _kind(self) -> Kind:
        return Kind(self.claim.kind)

    @property
    def _format(self) -> ResultFormat:
        record = self.claim.record
        if self._kind is Kind.SCRIPT:
            return ResultFormat.FILE
        return ResultFormat.of(record.get("format", ""), bool(record.get("compress")))

    async def _execute(self) -> Outcome:
        hosts = [resident.host for resident in self.residents if resident.host]
        if len(hosts) < len(self.residents):
            return Outcome(Verdict.LOST, "the model host was gone")
        limits, record = self.settings.limits, self.claim.record
        longest = limits.script_seconds if self._kind is Kind.SCRIPT else limits.run_seconds
        spec = RunSpec(
            format=self._format,
            kind=self._kind,
            form=record.get("form", ""),
            run_id=self.run_id,
            compress=bool(record.get("compress")),
            env=record.get("env") or {},
            limits=Limits(
                run_seconds=min(longest, record.get("seconds") or longest),
                memory_bytes=limits.memory_bytes,
                result_bytes=limits.result_bytes,
                payload_bytes=limits.payload_bytes,
                log_lines=limits.log_lines,
            ),
        )
        try:
            payload = await self._unless_stopped(self._payload())
            if self._stop.is_set():
                raise Interrupted
        except Interrupted:
            return Outcome(Verdict.CANCELLED)
        try:
            return await hosts[0].run(spec, payload, self._on_log, self._on_start, hosts[1:])
        except HostError as error:
            return Outcome(Verdict.LOST, str(error))

    async def _payload(self) -> bytes:
        key = self.claim.object_key
        if not key:
            return self.claim.payload
        return await until_done(
            "read a payload", lambda: in_daemon(self.store.get, key), self.settings.worker.offline_seconds
        )

    def _on_start(self) -> None:
        self.started = True
        self._tell(Status.RUNNING, "Your request is running.")

    def _on_log(self, line: str) -> None:
        self._tell(Status.LOG, line)

    def tell(self, line: str) -> None:
        """A line of the service's own among those that the block printed."""
        self._tell(Status.LOG, line)

    def _tell(self, status: Status, description: str) -> None:
        self._sequence += 1
        self._unwritten.append(Step(self._sequence, status, description))
        self._news.set()

    async def _write_steps(self) -> None:
        """Write events beside the run, those of a moment together; a short run's come with its terminal status.

        It may be ended at any point: what was not acknowledged stays in `_unwritten`, and repeating it does no harm.
        """
        while True:
            await self._news.wait()
            await asyncio.sleep(GATHER_SECONDS)
            await self._write_batch()

    async def _write_batch(self) -> None:
        self._news.clear()
        while batch := self._unwritten[:BATCH]:
            await self._steadily("write an event", lambda batch=batch: self.queue.event(self.claim, *batch))
            self._unwritten = [step for step in self._unwritten if step.sequence > batch[-1].sequence]

    # -- the end -----------------------------------------------------------------------------------------------------

    async def _settle(self, outcome: Outcome) -> None:
        if self.lease_lost:
            raise LeaseLost(f"Request {self.claim.request_id} was taken from this worker.")
        outcome.meta["isolation"] = outcome.isolation.value
        if outcome.verdict is Verdict.COMPLETED and outcome.result:
            try:
                await self._deliver(outcome.result, outcome.meta)
            except Interrupted:
                await self._undelivered(outcome)
        elif self.cancelled is not None:
            await self._finish_error(self.cancelled, outcome.meta)
        elif self.handed_back is not None:
            await self._release(self.handed_back, self._why_back)
        elif outcome.verdict in (Verdict.LOST, Verdict.CANCELLED):
            # What never began has no part in why its host died: it goes back without counting as a loss.
            reason = Release.LOSS if self.started else Release.HANDBACK
            await self._release(reason, outcome.description.rstrip(".") or "its executor was killed")
        else:
            await self._finish_error(outcome.description, outcome.meta)

    async def _deliver(self, result: ResultFile, meta: dict[str, Any]) -> None:
        seconds = float(meta.get("runtime", 0.0))
        transfer = {"bytes": result.size, "format": self._format.value, "part_bytes": digests.part_bytes(result.size)}
        if result.size <= self.settings.limits.inline_bytes:
            body = os.pread(result.fd, result.size, 0)
            data = {"inline": result.size, **transfer, "digests": await digests.of(result)}
            await self._steadily(
                "write a result",
                lambda: self.queue.finish(
                    self.claim, Status.COMPLETED, data=data, meta=meta, run_seconds=seconds,
                    result=body, steps=self._unwritten,
                ),
            )  # fmt: skip
            return
        key = result_key(self.claim.request_id, self.claim.attempt, self.claim.token)
        found, _ = await asyncio.gather(digests.of(result), self._store(key, result))
        data = {"object": key, **transfer, "digests": found}
        await self._steadily(
            "write a result",
            lambda: self.queue.finish(
                self.claim, Status.COMPLETED, data=data, meta=meta,
                run_seconds=seconds, object_key=key, steps=self._unwritten,
            ),
        )  # fmt: skip

    def _upload(self, key: str, result: ResultFile) -> None:
        with open(os.dup(result.fd), "rb") as file:
            file.seek(0)
            self.store.upload(key, file)

    async def _store(self, key: str, result: ResultFile) -> None:
        """Upload a result. Its object is due for deletion from before it exists, so that none can be orphaned.

        Raises:
            Unavailable: the store did not take it in time; the sentence is for the user.
            Interrupted: the attempt has to end first.
        """
        worker = self.settings.worker
        kept = worker.upload_seconds + worker.offline_seconds + ORPHAN_SECONDS
        await self._steadily("name an object", lambda: self.queue.expire_object(key, kept))
        waits = Waiting(self, result)
        try:
            if self.spool.away:
                await waits.on_disk()
            await self._unless_stopped(
                until_done("store a result", lambda: self._upload_once(key, result, waits), worker.upload_seconds)
            )
        except Unavailable as error:
            logger.error("result given up", request=self.claim.request_id, error=str(error))
            raise Unavailable(
                f"The object store was away for {worker.upload_seconds:.0f} s, and your result could not be stored: "
                f"try it again with `edif-hpc requests retry {self.claim.request_id}`."
            ) from error
        finally:
            waits.over()

    async def _upload_once(self, key: str, result: ResultFile, waits: Waiting) -> None:
        try:
            async with self.spool.turns:
                await in_daemon(self._upload, key, result)
        except AWAY:
            self.spool.away = True
            await waits.on_disk()
            raise
        self.spool.away = False

    async def _undelivered(self, outcome: Outcome) -> None:
        """The result was not stored before this attempt had to end."""
        outcome.verdict = Verdict.CANCELLED
        if self.lease_lost:
            raise LeaseLost(f"Request {self.claim.request_id} was taken from this worker.")
        if self.cancelled is not None:
            await self._finish_error(self.cancelled, outcome.meta)
        else:
            await self._release(Release.HANDBACK, NOT_STORED)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`, but no longer than this attempt may go on.

        Raises:
            Interrupted: it may not.
        """
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted
            return task.result()
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _finish_error(self, description: str, meta: dict[str, Any]) -> None:
        await self._steadily(
            "write an error",
            lambda: self.queue.finish(
                self.claim, Status.ERROR, description, meta=meta, run_seconds=float(meta.get("runtime", -1.0)),
                steps=self._unwritten,
            ),
        )  # fmt: skip

    async def _release(self, reason: Release, why: str) -> None:
        await self._write_batch()
        await self._steadily("release a request", lambda: self.queue.release(self.claim, reason, why))

    async def _steadily(self, what: str, action: Any) -> None:
        await until_done(what, action, self.settings.worker.offline_seconds)


class Waiting:
    """One result that the store did not take at once."""

    def __init__(self, attempt: Attempt, result: ResultFile) -> None:
        self.attempt = attempt
        self.result = result
        self.told = False
        self.taken = False

    async def on_disk(self) -> None:
        """Tell the user, and have the result wait where it holds no memory, as soon as there is room."""
        if not self.told:
            self.told = True
            self.attempt.tell(WAITS)
        if not self.taken and await self.attempt.spool.take(self.result):
            self.taken = True
            self.attempt.on_waiting(self.attempt)

    def over(self) -> None:
        if self.taken:
            self.attempt.spool.forget(self.result)


def log_end(claim: Claim, outcome: Outcome | None, began: float) -> None:
    logger.info(
        "request ended",
        request=claim.request_id,
        attempt=claim.attempt,
        user=claim.user,
        verdict=outcome.verdict.value if outcome else "taken",
        isolation=outcome.isolation.value if outcome else None,
        seconds=round(time.monotonic() - began, 4),
    )
