"""The agent: claims requests that fit, keeps their leases, and ends in an orderly way. Holds the credentials; no torch.

Loops run side by side: claiming, heartbeats (lease renewal and registration), listening to the doorbell, making models
resident, the walltime's clock, and the handover to a successor. Each claim is an `Attempt` in a task of its own. Redis
may go away at any await: loops pause and go on, attempts keep their results.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from edif_hpc import __version__
from edif_hpc.core import log, walltime
from edif_hpc.core.errors import ComponentError, Unavailable
from edif_hpc.core.lineage import Lineages
from edif_hpc.core.queue import Claim, Events, Queue, Release, Verdict, keys
from edif_hpc.core.queue.queue import FOREVER_SECONDS
from edif_hpc.core.registry import Registry, WorkerRecord
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store

from . import contract
from .attempt import Attempt, log_end
from .drain import Drain
from .handover import Chain, Handover, Serving
from .offers import offers
from .provision import Provision
from .residents import Resident, Residents
from .spool import Spool
from .steady import AWAY, until_done

logger = log.get("worker")

PREFETCH_BELOW_SECONDS = 0.5
"""A request is claimed ahead of a free slot only when runs are this short: behind a long one it would be stuck, while
another worker may be free."""
TURNS_SECONDS = 600.0  # how long it is remembered that a target had its turn
REDIS_PAUSE_SECONDS = 1.0
CANCEL_SECONDS = 0.5
FIRST_CONTACT_SECONDS = 60.0
"""How long an allocation that begins tries to reach Redis: one whose node never does must say so, and not hold it."""


class Agent:
    """One worker. `run` returns when it was told to stop, is idle for long, or its deadline is near."""

    def __init__(
        self,
        record: WorkerRecord,
        settings: Settings,
        queue: Queue,
        store: Store,
        residents: Residents,
        chain: Chain | None = None,
    ) -> None:
        self.record = record
        self.settings = settings
        self.queue = queue
        self.store = store
        self.residents = residents
        self.registry = Registry(queue.redis)
        folder = Path(settings.worker.spool).expanduser() if settings.worker.spool else residents.scratch
        self.spool = Spool(folder, settings.worker.spool_bytes)
        self.attempts: dict[str, Attempt] = {}
        self._claimed: dict[str, float] = {}  # when something last was for each target, so that they take turns
        self.draining = asyncio.Event()
        self.drain_reason = Release.HANDBACK
        self._wake = asyncio.Event()
        self._last_busy = time.monotonic()
        self._last_contact = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        pool = next((pool for pool in settings.pool if pool.name == record.pool), None)
        self.least = pool.min_workers if pool else 0
        serving = Serving(self._models, self._used, settings.worker.idle_seconds, self.least > 0, self.stop)
        lineages = Lineages(queue.redis)
        self.handover = Handover(record, chain, lineages, self.registry, serving) if chain else None
        patience = settings.worker.heartbeat_seconds
        serves = pool.serves if pool else _anything
        self.provision = Provision(
            queue, residents, serves, patience, self._model_ready, self._wake.set, pool=record.pool
        )  # fmt: skip

    @property
    def lease_seconds(self) -> float:
        return self.settings.worker.lease_seconds

    def remaining_seconds(self) -> float:
        """What is left for requests before the deadline, less what uploads and goodbyes take."""
        if self.record.deadline is None:
            return FOREVER_SECONDS
        flush = walltime.flush_seconds(self.record.deadline - self.record.started)
        return self.record.deadline - time.time() - flush

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until there is a reason to stop; then give back what cannot end."""
        if not await self._enter():
            return
        self.record.state = "serving"
        loops = [
            asyncio.create_task(loop)
            for loop in (self._heartbeats(), self._listen(), self._claims(), self.provision.run(), self._walltime())
        ]
        if self.handover:
            loops.append(asyncio.create_task(self._hand_over(self.handover)))
        stop = asyncio.create_task(self.draining.wait())
        try:
            await asyncio.wait([stop, *loops], return_when=asyncio.FIRST_COMPLETED)
            for loop in loops:
                if loop.done() and not loop.cancelled():
                    loop.result()
        finally:
            # Who breaks is started again, and its lineage goes on.
            leaving = [self.handover.leave(self.drain_reason)] if self.handover and self.draining.is_set() else []
            await asyncio.gather(self._drain(), *leaving)
            await _ended(stop, *loops)
            await self.residents.close()
            await self._leave()

    async def _leave(self) -> None:
        try:
            await self.registry.leave(self.record.worker_id)
        except AWAY as error:
            logger.warning("left without saying so: the registration lapses", error=str(error))

    def stop(self, reason: Release = Release.HANDBACK) -> None:
        """Begin to drain: claim nothing more, let what runs end, hand the rest back."""
        self.drain_reason = reason
        self.record.state = "draining"
        self.draining.set()
        self._wake.set()

    async def _enter(self) -> bool:
        """Whether this allocation may serve: it is the only one of its generation, and none after it has begun."""
        if self.handover is None:
            return True
        patience = min(FIRST_CONTACT_SECONDS, self.settings.worker.offline_seconds)
        try:
            entry = await until_done("enter the lineage", self.handover.enter, patience)
        except Unavailable as error:
            raise ComponentError(
                f"The node {self.record.host} does not reach the service's Redis ({error}); see whether "
                "network.address, or the host of redis.url, is one that compute nodes reach."
            ) from error
        if entry.used is not None:
            self._last_busy -= max(0.0, time.time() - entry.used)
        for key in entry.models:
            self.provision.load(key, inherited=True)
        if entry.superseded:
            logger.warning("superseded", why=entry.superseded)
        return not entry.superseded

    async def _hand_over(self, handover: Handover) -> None:
        while not self.draining.is_set():
            await asyncio.sleep(self.settings.worker.heartbeat_seconds)
            try:
                await handover.look()
            except AWAY as error:
                logger.warning("redis is away", error=str(error))

    def _models(self) -> list[str]:
        return [str(resident.key) for resident in self.residents.ready()]

    def _used(self) -> float:
        return time.time() if self.attempts else time.time() - (time.monotonic() - self._last_busy)

    async def _drain(self) -> None:
        self.record.state = "draining"
        logger.info("draining", running=len(self.attempts))
        drain = Drain(
            self.record.deadline, self.attempts, self._tasks, self.spool, self.settings.worker.offline_seconds
        )
        await drain.run(self.drain_reason, max(0.0, self.remaining_seconds()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._wake.set()
        self.provision.stir()
        if not task.cancelled() and (error := task.exception()):
            logger.error("attempt broke", error=repr(error), exc_info=error)

    # -- claiming ----------------------------------------------------------------------------------------------------

    async def _claims(self) -> None:
        while not self.draining.is_set():
            self._wake.clear()
            try:
                claim = await self._claim_next()
            except AWAY as error:
                logger.warning("redis is away", error=str(error))
                await asyncio.sleep(REDIS_PAUSE_SECONDS)
                continue
            if claim is None:
                await self._pause()

    async def _pause(self) -> None:
        """Wait for the bell; look anyway once a heartbeat, since a bell can be missed."""
        try:
            await asyncio.wait_for(self._wake.wait(), self.settings.worker.heartbeat_seconds)
        except TimeoutError:
            await self._stop_when_idle()

    async def _stop_when_idle(self) -> None:
        now = time.monotonic()
        if self.attempts or self.provision.is_busy:
            self._last_busy = now
        if now - self._last_busy > self.settings.worker.idle_seconds and not await self._is_kept():
            logger.info("idle", seconds=self.settings.worker.idle_seconds)
            self.stop()

    async def _is_kept(self) -> bool:
        """Whether this is one of the workers that its pool keeps also when nobody asks."""
        try:
            workers = await self.registry.workers() if self.least else []
        except AWAY:
            return True  # nothing is known of the others
        return is_kept(self.record, workers, self.least)

    async def _walltime(self) -> None:
        """The clock, which suffices without any signal."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.draining.wait(), self.remaining_seconds())
        if not self.draining.is_set():
            logger.info("walltime ends")
            self.stop(Release.WALLTIME)

    async def _claim_next(self) -> Claim | None:
        now = time.monotonic()
        free = offers(self.residents.ready(), self.provision.sets, self._has_slot, self._claimed, now)
        remaining = self.remaining_seconds()
        claim = await self.queue.claim(self.record.worker_id, list(free), self.lease_seconds, remaining)
        if claim is None:
            return None
        residents = free[claim.target]
        ahead = any(resident.running >= self.settings.worker.concurrency for resident in residents)
        self._last_busy = time.monotonic()
        self._claimed = {target: at for target, at in self._claimed.items() if now - at < TURNS_SECONDS}
        self._claimed[claim.target] = self._last_busy
        for resident in residents:
            resident.running += 1
            resident.last_used = self._last_busy
        attempt = Attempt(
            claim, residents, self.queue, self.store, self.settings, self.spool, self._leave_place, ahead=ahead
        )
        self.attempts[claim.request_id] = attempt
        self._spawn(self._serve(attempt))
        await asyncio.sleep(0)  # it is on its way to its host before the next one is asked for
        return claim

    def _has_slot(self, resident: Resident) -> bool:
        slots = self.settings.worker.concurrency
        if resident.running < slots:
            return True
        now = time.monotonic()
        ahead = [each for each in self.attempts.values() if resident in each.residents and each.holds_place]
        short = all(
            0 < attempt.claim.expected_seconds < PREFETCH_BELOW_SECONDS > now - attempt.claimed for attempt in ahead
        )
        return short and resident.running < slots + 1

    def _free_the_stuck(self) -> None:
        """Give back what was claimed ahead behind a run that proved to be long: another worker may be free."""
        now = time.monotonic()
        for attempt in list(self.attempts.values()):
            waited = now - attempt.claimed
            if not attempt.started and attempt.ahead and waited > self.settings.worker.heartbeat_seconds:
                attempt.hand_back(Release.HANDBACK, "the request before it takes long")

    async def _serve(self, attempt: Attempt) -> None:
        began = time.monotonic()
        try:
            outcome = await attempt.run()
            log_end(attempt.claim, outcome, began)
            if outcome and outcome.verdict is contract.Verdict.COMPLETED:
                self.record.completed += 1
        finally:
            self._leave_place(attempt)
            self.attempts.pop(attempt.claim.request_id, None)

    def _leave_place(self, attempt: Attempt) -> None:
        """An attempt needs its model no more: it has ended, or its result waits on disk for the object store."""
        if attempt.holds_place:
            attempt.holds_place = False
            for resident in attempt.residents:
                resident.running -= 1
                resident.last_used = time.monotonic()
            self._wake.set()
            self.provision.stir()

    # -- heartbeats and the doorbell -----------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        while True:
            pause = self.settings.worker.heartbeat_seconds
            try:
                await self._beat()
                self._last_contact = time.monotonic()
            except AWAY as error:
                silent = time.monotonic() - self._last_contact
                logger.warning("heartbeat failed", error=str(error), silent_seconds=round(silent, 1))
                if silent > self.settings.worker.offline_seconds:
                    logger.error("cut off from Redis, ending")
                    self.stop()
                pause = min(pause, REDIS_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _model_ready(self) -> None:
        if self.handover:
            await self.handover.note_ready()
        await self._announce()

    async def _announce(self) -> None:
        """Say what is here: with every heartbeat, and at once when a model has come or gone."""
        self.record.version = __version__
        self.record.running = len(self.attempts)
        self.record.models = self.residents.records()
        self.record.unable = self.provision.unable
        self.record.memory_used = sum(model.memory_bytes for model in self.record.models)
        await self.registry.announce(self.record, self.lease_seconds)

    async def _beat(self) -> None:
        self._free_the_stuck()
        attempts = list(self.attempts.values())
        await self._announce()
        verdicts = await self.queue.renew([attempt.claim for attempt in attempts], self.lease_seconds)
        for attempt, verdict in zip(attempts, verdicts, strict=True):
            if verdict is Verdict.LOST and attempt.claim.request_id in self.attempts:
                attempt.lose()
            elif verdict is Verdict.CANCEL:
                attempt.cancel("Cancelled.")
        for command in await self.registry.commands(self.record.worker_id):
            self._obey(command)
        await self.provision.look()

    def _obey(self, command: str) -> None:
        verb, _, argument = command.partition(" ")
        if verb == "cancel":
            request_id, _, why = argument.partition(" ")
            if request_id in self.attempts:
                self.attempts[request_id].cancel(why or "Cancelled.")
        elif verb in ("drain", "stop"):
            self.stop()
        elif verb == "load":
            self.provision.load(argument)
        elif verb == "unload":
            self.provision.unload(argument)

    async def _listen(self) -> None:
        events = Events(self.queue.redis)
        while True:
            try:
                async for channel, message in events.listen(keys.BELL_QUEUE, keys.BELL_WORKERS):
                    if channel == keys.BELL_WORKERS and message == self.record.worker_id:
                        for command in await self.registry.commands(self.record.worker_id):
                            self._obey(command)
                    elif channel == keys.BELL_QUEUE and message not in self.residents.models:
                        await self.provision.look()
                    self._wake.set()
            except AWAY as error:
                logger.warning("the doorbell is away", error=str(error))
            await asyncio.sleep(REDIS_PAUSE_SECONDS)


def is_kept(record: WorkerRecord, workers: Iterable[WorkerRecord], least: int) -> bool:
    """Whether a worker is among the `least` of its pool that stay also when nobody asks.

    A predecessor and its successor count as one, and both stay: which of them serves is the handover's business.
    """
    serving = (each for each in workers if each.pool == record.pool and each.state == "serving")
    return _slot(record) in sorted({_slot(each) for each in serving})[:least]


def _slot(record: WorkerRecord) -> str:
    """What of its pool's `min_workers` it takes up: its lineage's place, or its own."""
    return record.lineage or record.worker_id


def _anything(repo_id: str) -> bool:
    """What a worker without a `[[pool]]` serves."""
    return True


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they are over: a library that is just connecting may lose a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_SECONDS)
