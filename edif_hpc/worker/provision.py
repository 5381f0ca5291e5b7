"""Making models resident: which are waited for and not here, and bringing them up one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from edif_hpc.core import log
from edif_hpc.core.errors import EdifError, HostDied, ModelError, TooLarge
from edif_hpc.core.queue import Queue
from edif_hpc.core.target import Target
from edif_hpc.core.wire import ModelKey, Status

from .residents import Resident, Residents, Shares
from .steady import AWAY

logger = log.get("worker")

LOAD_ATTEMPTS = 3
"""When a process of a model host dies while it loads; one that says what is wrong with a model would say it again."""
ROOM_POLL_SECONDS = 1.0


class Provision:
    """What one worker does about models.

    Args:
        serves: whether a model, by its repo id, is this worker's business.
        patience: seconds after which it looks again, when nothing stirs.
        ready: called when a model is here, before anybody is told.
        changed: called afterwards, when requests may be claimed for it or were refused.
        pool: this worker's, for those who ask for one.
    """

    def __init__(
        self,
        queue: Queue,
        residents: Residents,
        serves: Callable[[str], bool],
        patience: float,
        ready: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
        pool: str = "",
    ) -> None:
        self.queue = queue
        self.residents = residents
        self.serves = serves
        self.patience = patience
        self.ready = ready
        self.changed = changed
        self.pool = pool
        self.sets: dict[Target, float] = {}
        """What somebody waits for here that is more than one model, or one of this pool alone; with since when."""
        self.unable: dict[str, str] = {}
        """What this worker is too small for, with the reason."""
        self._stir = asyncio.Event()
        self._wanted: dict[str, float] = {}
        self._told_to_load: set[str] = set()
        self._inherited: set[str] = set()
        self._failed_loads: dict[str, int] = {}

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for a model; what a predecessor held is no reason to stay."""
        loading = {key for key, resident in self.residents.models.items() if resident.state == "loading"}
        return bool((self._wanted.keys() | loading) - self._inherited)

    def stir(self) -> None:
        """Look soon: something about models may have changed."""
        self._stir.set()

    def load(self, key: str, *, inherited: bool = False) -> None:
        """Bring a model up without a request for it; `inherited`: because a predecessor holds it."""
        self._told_to_load.add(key)
        if inherited:
            self._inherited.add(key)
        self._wanted.setdefault(key, time.monotonic())
        self.stir()

    def unload(self, key: str) -> None:
        if key in self.residents.models:
            self.residents.models[key].retiring = True
            self.stir()

    async def look(self) -> None:
        """Remember which models are waited for that are not here."""
        now = time.monotonic()
        found = [Target.parse(text) for text in await self.queue.waiting()]
        ours = [target for target in found if self._is_ours(target)]
        self.unable = {str(target): why for target in ours if (why := self._why_not(target))}
        able = [target for target in ours if str(target) not in self.unable]
        sets = {target: self.sets.get(target, now) for target in able if not target.single}
        if sets.keys() - self.sets.keys():
            self.changed()
        self.sets = sets
        needed = dict.fromkeys(str(key) for target in able for key in target.keys)
        absent = (key for key in (*needed, *self._told_to_load) if key not in self.residents.models)
        wanted = {key: self._wanted.get(key, now) for key in absent}
        if wanted != self._wanted:
            self._wanted = wanted
            self.stir()

    def _is_ours(self, target: Target) -> bool:
        return target.pool in ("", self.pool) and all(self.serves(key.repo_id) for key in target.keys)

    def _why_not(self, target: Target) -> str:
        """Why this worker can never serve what a larger one may; "" when it can.

        What is wrong with a model anywhere is told when it loads.
        """
        if len(target.keys) > 1:
            return self.residents.why_never(target.keys)
        try:
            self.residents.known(target.keys[0])
        except ModelError as error:
            return str(error) if isinstance(error, TooLarge) else ""
        return ""

    async def run(self) -> None:
        """Bring up what is waited for, and replace hosts that died."""
        while True:
            self._stir.clear()
            try:
                dead = self._forget_the_dead()
                if await self.residents.evict_retired() or dead:
                    await self.look()  # somebody may wait for what has just gone
                for key in sorted(self._wanted, key=lambda key: self._wanted[key]):
                    await self._bring_up(key)
            except AWAY as error:
                logger.warning("redis is away", error=str(error))
            await self._until_stirred()

    def _forget_the_dead(self) -> list[Resident]:
        held = [resident for resident in self.residents.models.values() if resident.state == "ready"]
        dead = [resident for resident in held if resident.host and resident.host.died.done()]
        for resident in dead:
            logger.error("model host died", model=resident.key.repo_id)
            self.residents.forget(resident)
        return dead

    async def _until_stirred(self) -> None:
        """Wait until something about models changed; while one waits for room, look again every second."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stir.wait(), ROOM_POLL_SECONDS if self._wanted else self.patience)

    async def _bring_up(self, text: str) -> None:
        key = ModelKey.parse(text)
        try:
            waited_for = await self._waited_for()
            together = self._together(text)
            room = self.residents.room_for(key, waited_for, together)
            if room is None:
                await self._tell_waiting(text, self.residents.why_no_room(key))
                if await self.residents.evict_retired():
                    room = self.residents.room_for(key, waited_for, together)
            if room is None:
                return
            await self._tell_waiting(text, f"Loading {key.repo_id}.")
            await self._load(key, room)
            self._failed_loads.pop(text, None)
        except TooLarge as error:  # somebody told this worker to load it; who waits for it is left to larger ones
            logger.error("model is too large", model=key.repo_id, error=str(error))
            self.residents.give_up(text, str(error))
        except ModelError as error:
            await self._refuse_waiting(text, str(error))
        except EdifError as error:
            logger.error("model failed to load", model=key.repo_id, error=str(error))
            self._failed_loads[text] = self._failed_loads.get(text, 0) + 1
            if not isinstance(error, HostDied) or self._failed_loads[text] >= LOAD_ATTEMPTS:
                self.residents.give_up(text, str(error))
                await self._refuse_waiting(text, f"{key.repo_id} could not be loaded: {error}")
        self._wanted.pop(text, None)
        self._told_to_load.discard(text)
        self._inherited.discard(text)
        self.changed()

    async def _load(self, key: ModelKey, room: Shares) -> None:
        logger.info("loading model", model=key.repo_id, device=",".join(room))
        began = time.monotonic()

        async def tell(sentence: str) -> None:
            with contextlib.suppress(*AWAY):  # the load goes on without Redis
                await self._tell_waiting(str(key), sentence)

        resident = await self.residents.load(key, room, lambda step: None, tell)
        if resident.host:
            resident.host.died.add_done_callback(lambda _: self.stir())
        logger.info("model ready", model=key.repo_id, seconds=round(time.monotonic() - began, 2))
        await self.ready()

    async def _waited_for(self) -> set[str]:
        """Models that somebody waits for, alone or among others."""
        return {str(key) for text in await self.queue.waiting() for key in Target.parse(text).keys}

    def _together(self, text: str) -> set[str]:
        """The models that somebody needs together with this one: to make room for it they are no use."""
        sets = [{str(key) for key in target.keys} for target in self.sets]
        return {key for keys in sets if text in keys for key in keys}

    async def _targets_of(self, text: str) -> list[str]:
        """What somebody waits for here that this model is a part of."""
        found = [Target.parse(target) for target in await self.queue.waiting()]
        return [str(each) for each in found if text in map(str, each.keys) and self._is_ours(each)]

    async def _tell_waiting(self, text: str, sentence: str) -> None:
        for target in await self._targets_of(text):
            await self.queue.note(await self.queue.waiting_for(target), Status.DEPLOYING, sentence)

    async def _refuse_waiting(self, text: str, sentence: str) -> None:
        for target in await self._targets_of(text):
            for request_id in await self.queue.waiting_for(target):
                await self.queue.withdraw(request_id, "", sentence, only_waiting=True)
