"""The models on one worker: loaded on demand within the memory of each device, the least recently used idle one leaves.

What it must not know: the queue. It is asked to make a model resident, and says what is resident.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.allowed import check_model
from edif_hpc.core.errors import EdifError, HostDied, HostError, ModelError, TooLarge
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.registry import ModelRecord, ModelState
from edif_hpc.core.settings import Settings
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.checkpoint import Checkpoint, describe
from edif_hpc.hardware.memory import check_fits, gib, required_bytes, spread_over, weight_bytes, weight_room
from edif_hpc.hardware.tensor_parallel import check_split

from .contract import HostSpec
from .host_client import ModelHost, last_words
from .staging import Staging, Tell, nobody

LEAST_TURN_SECONDS = 10.0
TURN_PER_LOAD = 2.0
"""A model in use keeps its place so many times as long as its load took: else models would only be loaded."""
FAILURE_SECONDS = 300.0
"""How long a model that could not be loaded is shown as failed: it is tried again whenever somebody asks for it."""

logger = log.get("worker")


@dataclass(frozen=True)
class Failure:
    """Why a load failed, and when (Unix time)."""

    reason: str
    at: float


Shares = dict[str, int]
"""Device -> bytes that a model takes there: one device, or several for one that is spread, which has them to itself."""


@dataclass
class Resident:
    """One model here. `retiring` ones take no more requests, so that they can leave."""

    key: ModelKey
    shares: Shares
    state: ModelState = "loading"
    host: ModelHost | None = None
    running: int = 0
    retiring: bool = False
    last_used: float = field(default_factory=time.monotonic)
    ready_since: float = 0.0
    load_seconds: float = 0.0

    @property
    def memory_bytes(self) -> int:
        return sum(self.shares.values())

    @property
    def had_its_turn(self) -> bool:
        """Whether it served long enough for its load to have been worth it, so that others may have its place."""
        least = max(LEAST_TURN_SECONDS, TURN_PER_LOAD * self.load_seconds)
        return time.monotonic() - self.ready_since >= least

    def record(self) -> ModelRecord:
        return ModelRecord(
            model_key=str(self.key),
            state=self.state,
            memory_bytes=self.memory_bytes,
            running=self.running,
            pids=self.host.pids() if self.host else {},
        )


class Residents:
    """Loads, keeps and evicts.

    Args:
        devices: torch device, or those that share a model, -> bytes that models may take there, on each.
        accelerator: cpu, cuda or rocm: what a model costs beside its weights differs.
    """

    def __init__(
        self,
        settings: Settings,
        cache: Path,
        scratch: Path,
        devices: dict[str, int],
        accelerator: str,
        isolation: Isolation,
    ) -> None:
        self.settings = settings
        self.cache = cache
        self.scratch = scratch
        self.devices = devices
        self.accelerator = accelerator
        self.isolation = isolation
        self.staging = Staging(settings.models.weights, cache, scratch)
        self.models: dict[str, Resident] = {}
        self.failures: dict[str, Failure] = {}
        self._loading = asyncio.Lock()

    def ready(self) -> list[Resident]:
        return [resident for resident in self.models.values() if resident.state == "ready" and not resident.retiring]

    def records(self) -> list[ModelRecord]:
        """What is here, and what lately could not be brought here."""
        since = time.time() - FAILURE_SECONDS
        self.failures = {key: failure for key, failure in self.failures.items() if failure.at > since}
        failed = [
            ModelRecord(model_key=key, state="failed", error=failure.reason, failed=failure.at)
            for key, failure in self.failures.items()
            if key not in self.models
        ]
        return [resident.record() for resident in self.models.values()] + failed

    def used(self, device: str) -> int:
        return sum(resident.shares.get(device, 0) for resident in self.models.values())

    def choices(self, key: ModelKey) -> list[Shares]:
        """What the model may take, from its headers in the cache: its size on any one device, or all of several.

        Raises:
            TooLarge: for what is here.
            ModelError: not in the cache, not allowed, or not to be split as asked.
        """
        check_model(self.settings.models, key)
        checkpoint: Checkpoint = describe(self.cache, key.repo_id, key.revision)
        dtype, ranks = self.settings.models.dtype.get(key.repo_id, "auto"), self.settings.models.tensor_parallel
        check_split(checkpoint, ranks)
        needed = required_bytes(checkpoint, dtype, self.accelerator, ranks)
        if needed <= max(self.devices.values()):
            return [{device: needed} for device, budget in self.devices.items() if needed <= budget]
        if ranks > 1:
            check_fits(checkpoint, max(self.devices.values()), dtype, self.accelerator, ranks)
        over = spread_over(weight_bytes(checkpoint, dtype), self.devices, self.accelerator)
        if over and self.isolation is Isolation.NONE and checkpoint.quantization is None:
            return [{device: self.devices[device] for device in over}]
        raise TooLarge(self._too_large(checkpoint, needed, over))

    def _too_large(self, checkpoint: Checkpoint, needed: int, over: tuple[str, ...]) -> str:
        """Why a model that needs more than the largest device has cannot be here either, though it may fit `over`."""
        here = " and ".join(f"{device} with {gib(budget)}" for device, budget in self.devices.items())
        said = f"The model {checkpoint.repo_id!r} needs about {gib(needed)}, and this worker has {here}"
        if not over:
            return f"{said}; use a smaller model, or ask its admin for a larger worker or a smaller dtype."
        if checkpoint.quantization is not None:
            return f"{said}. It would fit over {len(over)}, but a quantised model stays on one; use a smaller one."
        return (
            f"{said}. It would fit over {len(over)}, but only workers at isolation none spread a model, and this one "
            f"is at {self.isolation}; ask its admin for such a worker, or use a smaller model."
        )

    def room_for(self, key: ModelKey, waited_for: Collection[str], together: Collection[str] = ()) -> Shares | None:
        """Room on a device or several, else None after asking others to make some: the least recently used idle first.

        One in use (something runs, or waits for it as `waited_for` tells) is asked only when it had its turn; one that
        somebody needs `together` with this one is not asked.
        """
        choices = self.choices(key)
        for choice in choices:
            if all(self.used(device) + size <= self.devices[device] for device, size in choice.items()):
                return choice
        if any(all(self._free_soon(device) >= size for device, size in choice.items()) for choice in choices):
            return None  # as soon as those that leave are gone
        others = [r for r in self.ready() if str(r.key) not in together]
        in_use = {str(r.key) for r in others if r.running or str(r.key) in waited_for}
        idle = sorted((r for r in others if str(r.key) not in in_use), key=lambda r: r.last_used)
        had_turn = [r for r in others if str(r.key) in in_use and r.had_its_turn]
        in_turn = sorted(had_turn, key=lambda r: r.ready_since)
        for victims in (idle, idle + in_turn):
            for choice in choices:
                if self._retire(victims, choice, key):
                    return None
        return None

    def _retire(self, candidates: list[Resident], choice: Shares, wanted: ModelKey) -> bool:
        """Ask as many of these as it takes to free what is missing; nobody, if all together would not do."""
        leaving: list[Resident] = []

        def missing(device: str) -> int:
            freed = sum(resident.shares.get(device, 0) for resident in leaving)
            return choice[device] - self._free_soon(device) - freed

        for resident in candidates:
            if any(missing(device) > 0 for device in choice.keys() & resident.shares.keys()):
                leaving.append(resident)
        if any(missing(device) > 0 for device in choice):
            return False
        for resident in leaving:
            resident.retiring = True
            logger.info("model makes room", model=resident.key.repo_id, wanted=wanted.repo_id)
        return True

    def _free_soon(self, device: str) -> int:
        """What is free, or will be when those that leave are gone."""
        staying = sum(r.shares.get(device, 0) for r in self.models.values() if not r.retiring)
        return self.devices[device] - staying

    def why_never(self, keys: Sequence[ModelKey]) -> str:
        """Why these models can never be here together, in one sentence; "" when they can."""
        free = dict(self.devices)
        try:
            choices = sorted(map(self.known, keys), key=lambda each: max(map(_total, each)), reverse=True)
        except ModelError as error:
            return str(error)
        for each in choices:  # the largest first, each where it fits
            fitting = [one for one in each if all(size <= free[device] for device, size in one.items())]
            if not fitting:
                needed = sum(min(map(_total, choice)) for choice in choices)
                here = " and ".join(f"{device} with {gib(budget)}" for device, budget in self.devices.items())
                return (
                    f"{' and '.join(key.repo_id for key in keys)} need about {gib(needed)} together, and this worker "
                    f"has {here}; use fewer or smaller models at a time, or ask its admin for a larger worker."
                )
            for device, size in fitting[0].items():
                free[device] -= size
        return ""

    def known(self, key: ModelKey) -> list[Shares]:
        """What a model takes: of one that is here what it really does."""
        resident = self.models.get(str(key))
        return [resident.shares] if resident and resident.state == "ready" else self.choices(key)

    def why_no_room(self, key: ModelKey) -> str:
        """What those who wait for a model that has no room yet are told."""
        leaving = sorted(resident.key.repo_id for resident in self.models.values() if resident.retiring)
        if leaving:
            return f"Making room for {key.repo_id}: {', '.join(leaving)} leaves."
        return f"Waiting for room for {key.repo_id}: every model here is in use."

    async def evict_retired(self) -> list[Resident]:
        """Close retiring models that nobody uses any more."""
        leaving = [r for r in self.models.values() if r.retiring and not r.running and r.state == "ready"]
        for resident in leaving:
            del self.models[str(resident.key)]
            if resident.host:
                await resident.host.close()
            logger.info("model evicted", model=resident.key.repo_id)
        return leaving

    async def load(
        self, key: ModelKey, shares: Shares, on_progress: Callable[[str], None], tell: Tell = nobody
    ) -> Resident:
        """Make a model resident.

        Args:
            on_progress: called with each step of the model host.
            tell: called with how far its weights are on their way, where that takes long.

        Raises:
            HostDied: it could not be loaded, and another try may do; see `give_up`.
            HostError: it could not be loaded; the reason is remembered in `failures` for a while.
        """
        async with self._loading:
            began = time.monotonic()
            resident = Resident(key, dict(shares))
            self.models[str(key)] = resident
            try:
                cache = await self.staging.bring(key, self.models.keys(), tell)
                resident.host = await ModelHost.start(self._spec(key, shares, cache), on_progress)
            except EdifError as error:
                del self.models[str(key)]
                if not isinstance(error, HostDied):
                    self.give_up(str(key), str(error))
                # For the admin alone: what a host writes names paths, and may be a stranger's words.
                logger.error(
                    "model host failed", model=key.repo_id, error=str(error), last_words=last_words(self.scratch)
                )
                raise
            except BaseException:
                self.models.pop(str(key), None)
                raise
            if len(shares) == 1:
                (device,) = shares
                resident.shares[device] = max(shares[device], resident.host.memory_bytes)
            resident.state = "ready"
            resident.last_used = resident.ready_since = time.monotonic()
            resident.load_seconds = resident.ready_since - began
            self.failures.pop(str(key), None)
            return resident

    def _spec(self, key: ModelKey, shares: Shares, cache: Path) -> HostSpec:
        worker, models = self.settings.worker, self.settings.models
        rooms = {device: weight_room(size, self.accelerator) for device, size in shares.items()}
        return HostSpec(
            model_key=str(key),
            cache=cache,
            scratch=self.scratch,
            isolation=self.isolation,
            required=worker.required_isolation,
            dtype=models.dtype.get(key.repo_id, "auto"),
            device=next(iter(shares)),
            spread=rooms if len(rooms) > 1 else {},
            threads=worker.threads or default_threads(worker.concurrency * models.tensor_parallel),
            spares=worker.spares,
            concurrency=worker.concurrency,
            adapters={name: str(adapter_folder(self.cache, name)) for name in models.adapters},
            ranks=models.tensor_parallel,
        )

    def give_up(self, key: str, why: str) -> None:
        """Have the fleet know that this model cannot be loaded here: it tells whoever waits."""
        self.failures[key] = Failure(why, time.time())

    def forget(self, resident: Resident) -> None:
        """A host died: its model is no longer here."""
        self.models.pop(str(resident.key), None)

    async def close(self) -> None:
        hosts = [resident.host for resident in self.models.values() if resident.host]
        self.models.clear()
        await asyncio.gather(*(host.close() for host in hosts))


def _total(shares: Shares) -> int:
    return sum(shares.values())


def model_memory(devices: Mapping[str, int], isolation: Isolation, ranks: int = 1) -> int:
    """The most bytes that one model may have on a worker with these devices: the sum where models are spread."""
    return sum(devices.values()) if isolation is Isolation.NONE and ranks == 1 else max(devices.values())


def default_threads(sharers: int) -> int:
    """The cores that each of so many processes has for itself, at least one."""
    import os

    return max(1, len(os.sched_getaffinity(0)) // sharers)


def adapter_folder(cache: Path, name: str) -> Path:
    """Where an admin's adapter lies in the cache.

    Raises:
        HostError: it is not there.
    """
    try:
        return describe(cache, name, None).path
    except ModelError as error:
        raise HostError(f"The adapter {name} of models.adapters is not usable: {error}") from error
