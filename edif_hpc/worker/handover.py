"""How a worker's service outlives its allocation: it asks for a successor in time, brings it up, and lets it take over.

A worker that has nothing to hand over asks for nobody. One that ends for another reason than its walltime ends its
lineage too, and takes back a successor that has not begun.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.core import log, walltime
from edif_hpc.core.errands import RECALL, SERVED, SUCCESSOR
from edif_hpc.core.errors import EdifError
from edif_hpc.core.lineage import Answer, Entry, Lineages
from edif_hpc.core.queue import Release
from edif_hpc.core.registry import Registry, WorkerRecord

from .errands import Supervisor
from .steady import AWAY

logger = log.get("worker")

RETRY_SECONDS = 20.0
"""Between two asks for a successor, when the first failed."""


@dataclass(frozen=True)
class Chain:
    """A worker's place in a lineage, as its supervisor told it.

    Args:
        line: the folder of their pipes.
        overlap: whether a successor starts beside its predecessor; else after it.
    """

    lineage: str
    generation: int
    job_id: str
    line: Path
    overlap: bool = True


@dataclass(frozen=True)
class Serving:
    """What a handover must know of its worker.

    Args:
        models: keys of those that are ready.
        used: Unix time of the last request.
        idle_seconds: how long a lineage may be without requests.
        kept: whether the pool wants workers also when nobody asks.
        let_go: begins to drain.
    """

    models: Callable[[], Sequence[str]]
    used: Callable[[], float]
    idle_seconds: float
    kept: bool
    let_go: Callable[[Release], None]


class Handover:
    """One allocation's part in its lineage."""

    def __init__(
        self, record: WorkerRecord, chain: Chain, lineages: Lineages, registry: Registry, serving: Serving
    ) -> None:
        record.lineage, record.generation = chain.lineage, chain.generation
        self.record = record
        self.job_id = chain.job_id
        self.overlap = chain.overlap
        self.supervisor = Supervisor(chain.line)
        self.lineages = lineages
        self.registry = registry
        self.serving = serving
        self.successor = ""
        self._taker = secrets.token_hex(8)
        self._ask_again = 0.0
        self._asked = asyncio.Lock()
        self._held: set[str] = set()
        self._told_failed = False
        self._submitted: float | None = None
        self._ready_after: float | None = None
        self._pace: float | None = None

    async def enter(self) -> Entry:
        """Begin to be this generation, unless another allocation is or was it."""
        record = self.record
        entry = await self.lineages.enter(record.lineage, record.generation, self.job_id)
        if not entry.superseded:
            self._submitted = entry.asked
            self._pace = await self.lineages.pace(record.pool)
            self.successor = await self.lineages.job_of(record.lineage, record.generation + 1)
            self._held = set(entry.models)
        return entry

    async def note_ready(self) -> None:
        """A model is here, and nobody was told yet. How long that took is for the one that asks for the next."""
        if self._ready_after is not None:
            return
        now = time.time()
        self._ready_after = now - self.record.started
        logger.info("READY", generation=self.record.generation, models=list(self.serving.models()))
        self.supervisor.note(SERVED, self.record.generation)
        first = await self.lineages.note_ready(self.record.lineage, self.record.generation)
        # One that waited for its predecessor's end says nothing of Slurm's queue.
        if first and self.overlap and self._submitted:
            await self.lineages.note_pace(self.record.pool, now - self._submitted)

    async def look(self) -> None:
        """Do what the time asks for; called with every heartbeat."""
        if time.time() < self.ask_at():
            return
        if self.successor:
            await self._let_take_over()
        elif time.time() >= self._ask_again and self._is_worth_it():
            self._ask_again = time.time() + RETRY_SECONDS
            await self._ask()

    async def leave(self, reason: Release) -> None:
        """See to the lineage at this worker's end."""
        record = self.record
        try:
            if reason is Release.WALLTIME:
                if not self.successor and self._is_worth_it():
                    await self._ask()  # a signal came before the clock knew
                await self._bequeath()
                return
            # First of all, so that a successor that begins before it is taken back finds that it must not serve.
            ended = await self.lineages.end(record.lineage, record.generation, reason.value)
            if ended and self.successor:
                await self.supervisor.ask(RECALL, record.generation + 1)
        except (*AWAY, EdifError) as error:
            logger.warning("the lineage could not be told", error=str(error))

    def ask_at(self) -> float:
        """Unix time from which a successor is wanted."""
        deadline, started = self.record.deadline, self.record.started
        if deadline is None:
            return float("inf")
        pace = self._pace if self._pace is not None else 2 * (self._ready_after or 0.0)
        return deadline - walltime.lead_seconds(deadline - started, pace)

    def _is_worth_it(self) -> bool:
        if self.serving.kept:
            return True
        return bool(self.serving.models()) and time.time() - self.serving.used() < self.serving.idle_seconds

    async def _ask(self) -> None:
        """Get a successor, unless somebody else is at it. One at a time: the clock and a signal may come together."""
        async with self._asked:
            if self.successor:
                return
            lineage, number = self.record.lineage, self.record.generation + 1
            intent = await self.lineages.take(lineage, number, self._taker)
            if intent.answer is Answer.SUBMITTED:
                self.successor = intent.detail
            if intent.answer is not Answer.YOURS:
                logger.info("no successor is asked for", answer=intent.answer.value, detail=intent.detail)
                return
            await self._bequeath()
            logger.info("asking for a successor", generation=number)
            try:
                job_id = await self.supervisor.ask(SUCCESSOR, number)
            except EdifError as error:
                logger.error("no successor", error=str(error))
                return
            self.successor = await self.lineages.record(lineage, number, job_id)
            logger.info("successor submitted", generation=number, job=self.successor)

    async def _bequeath(self) -> None:
        self._held = set(self.serving.models())
        await self.lineages.bequeath(self.record.lineage, self.serving.used(), sorted(self._held))

    async def _let_take_over(self) -> None:
        """Let go once the successor has loaded what was here when it was asked for; else serve until the end."""
        number = self.record.generation + 1
        record = await self.registry.worker(self._worker(number))
        if record is None or record.state != "serving":
            return
        states = {model.model_key: model for model in record.models}
        held = [states[key] for key in self._held if key in states]
        if len(held) == len(self._held) and all(model.state == "ready" for model in held):
            logger.info("successor ready", generation=number, worker=record.worker_id)
            self.serving.let_go(Release.WALLTIME)
        elif not self._told_failed and (failed := [model for model in held if model.state == "failed"]):
            self._told_failed = True
            causes = {model.model_key: model.error for model in failed}
            logger.error("the successor cannot hold what is served here", generation=number, causes=causes)

    def _worker(self, generation: int) -> str:
        return f"{self.record.worker_id.removesuffix(f'-g{self.record.generation}')}-g{generation}"
