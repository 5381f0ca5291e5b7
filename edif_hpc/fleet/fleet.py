"""The fleet's loops: see who waits, decide, act; and beside that the queue's upkeep, which waits for Redis alone.

One leader at a time; whoever else runs stands by.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from edif_hpc.core import log
from edif_hpc.core.errors import EdifError
from edif_hpc.core.lineage import Lineages
from edif_hpc.core.pools import Pool as PoolSettings
from edif_hpc.core.queue import Queue, keys
from edif_hpc.core.registry import Registry, WorkerRecord
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store
from edif_hpc.core.target import Target as Needed
from edif_hpc.core.wire import Status

from .acts import Acts
from .announce import announce, leave
from .brake import asked, held, hold, resumed, started, stopped
from .decide import ALLOCATIONS, PROCESSES, Decision, Patience, Pool, Target, decide
from .health import Health, read_health, write_health
from .local import Ended, Launcher
from .notices import Alerts, notice_of
from .objects import Objects
from .slurm.commands import SlurmSilent

logger = log.get("fleet")

NAME = "fleet"
LEAD_TICKS = 4
"""Ticks a leader may miss before another takes over."""
LEAD_LEAST_SECONDS = 3.0
SWEEP_LEAST_SECONDS = 0.05
"""After the end of a lease: nearer, and its sweep would come before it."""
WANTED_SECONDS = 600.0
"""How long the fleet goes on trying to bring up a worker for a model that an admin wants."""

RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
YIELD = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Fleet:
    """Scales pools to what waits.

    A look at the queue waits for no command of Slurm's: what runs is what was told last, and what is decided is done
    beside it.

    Args:
        launchers: one for each of `pools`, by its name.
    """

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        store: Store,
        pools: Sequence[PoolSettings],
        launchers: dict[str, Launcher],
        alerts: Alerts,
    ) -> None:
        self.settings = settings
        self.redis: Any = redis
        self.store = store
        self.pools = {pool.name: pool for pool in pools}
        self.launchers = launchers
        self.alerts = alerts
        self.queue = Queue(redis, settings.limits)
        self.registry = Registry(redis)
        self.lineages = Lineages(redis)
        self.patience = {pool.name: _patience(pool, settings) for pool in pools}
        self.health = {pool.name: Health() for pool in pools}
        self._written: dict[str, Health] = {}
        self.objects = Objects(self.queue, store, lambda: self._is_leader)
        self.token = secrets.token_hex(8)
        self._renew = redis.register_script(RENEW)
        self._yield = redis.register_script(YIELD)
        self._is_leader = False
        self._launches, self._halts = Acts(len(self.pools)), Acts(len(self.pools))
        self._gone: list[tuple[str, Ended]] = []
        """Workers that ended, by pool, of which account is still to be taken."""
        self._halted: set[str] = set()
        self._asked: set[str] = set()

    @property
    def lead_seconds(self) -> float:
        return max(LEAD_LEAST_SECONDS, LEAD_TICKS * self.settings.fleet.tick_seconds)

    async def run(self, stop: asyncio.Event) -> None:
        """Tick until told to stop. Redis may go away at any time; the loop waits for it."""
        away = False
        loops = [asyncio.create_task(self._keep_up()), asyncio.create_task(self.objects.run())]
        while not stop.is_set():
            try:
                if await self.leads():
                    await self.tick()
                away = False
            except (RedisError, OSError) as error:
                if not away:
                    logger.warning("redis is away", error=str(error))
                away = True
            for loop in loops:
                if loop.done():
                    loop.result()  # it never ends but by a fault, which must not go unseen
            await _sleep(stop, self.settings.fleet.tick_seconds)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, self._launches.end(), self._halts.end(), return_exceptions=True)
        try:
            await self._yield(keys=[keys.FLEET_LEADER], args=[self.token])
            await leave(self.redis, NAME)
        except (RedisError, OSError) as error:
            logger.warning("redis is away at the end", error=str(error))

    async def _keep_up(self) -> None:
        """Stay the leader and look after the queue, however long a look takes; a follower stays one."""
        pause = self.settings.fleet.tick_seconds
        while True:
            await asyncio.sleep(pause)
            pause = self.settings.fleet.tick_seconds
            if self._is_leader:
                try:
                    if await self.leads():
                        pause = await self.tend()
                except (RedisError, OSError):
                    self._is_leader = False  # the loop says that Redis is away, and asks anew

    async def tend(self) -> float:
        """What must go on whatever Slurm and the store do: say that this lives, take requests back from the dead.

        Returns the seconds until it is due again: at the end of the next lease, should nobody renew it.
        """
        await announce(self.redis, NAME)
        tick = self.settings.fleet.tick_seconds
        swept = await self.queue.sweep(self.settings.worker.lease_seconds, tick)
        if swept.reclaimed or swept.dead or swept.overdue:
            logger.warning("swept", reclaimed=swept.reclaimed, dead=swept.dead, overdue=swept.overdue)
        return tick if swept.due_seconds is None else min(tick, max(SWEEP_LEAST_SECONDS, swept.due_seconds))

    async def leads(self) -> bool:
        """Become or stay the leader, if nobody else is. Who becomes it takes up what the one before knew of pools."""
        led = self._is_leader
        answer = await self._renew(keys=[keys.FLEET_LEADER], args=[self.token, int(self.lead_seconds * 1000)])
        if answer and not led:
            self.health |= {name: kept for name, kept in (await read_health(self.redis)).items() if name in self.pools}
        self._is_leader = bool(answer)
        return self._is_leader

    async def tick(self) -> None:
        """One look at who waits and what runs."""
        self._launches.settle()
        self._halts.settle()
        await self._bury()
        workers = await self.registry.workers()
        waiting = {**dict.fromkeys(await self._wanted(workers), 0), **await self.queue.waiting()}
        waited = await self.queue.oldest()
        targets = [_target(key, count, waited.get(key, 0.0)) for key, count in waiting.items()]
        await self._halt(workers)
        self._asked = await asked(self.redis)
        pools = await asyncio.to_thread(self._pools)
        decision = decide(targets, workers, pools, time.time())
        await self._act(decision)
        await self._tell(pools)

    async def _wanted(self, workers: list[WorkerRecord]) -> list[str]:
        """Models that an admin wants loaded: told to a worker as soon as one serves. Returns those still to tell."""
        await self.redis.zremrangebyscore(keys.WANTED, "-inf", time.time() - WANTED_SECONDS)
        wanted = [key.decode() for key in await self.redis.zrange(keys.WANTED, 0, -1)]
        serving = [worker for worker in workers if worker.state == "serving"]
        untold = []
        for key in wanted:
            able = [worker for worker in serving if self._serves(worker, key)]
            if not able:
                untold.append(key)
                continue
            least = min(able, key=lambda worker: len(worker.models))
            if not any(model.model_key == key for worker in serving for model in worker.models):
                await self.registry.command(least.worker_id, f"load {key}")
            await self.redis.zrem(keys.WANTED, key)
        return untold

    def _serves(self, worker: WorkerRecord, key: str) -> bool:
        pool = self.pools.get(worker.pool)
        return pool is None or pool.serves(_target(key, 0).repo_id)

    def _pools(self) -> list[Pool]:
        pools = []
        for name, launcher in self.launchers.items():
            health, launched = self.health[name], launcher.launched()
            health.launched, health.pending = len(launched), launcher.pending()
            pools.append(
                Pool(
                    name,
                    self.pools[name].max_workers,
                    least=self.pools[name].min_workers,
                    stopped=name in self._halted,
                    asked=name in self._asked,
                    launching=self._launches.busy(name),
                    pending=health.pending,
                    trouble=launcher.trouble(),
                    models=self.pools[name].models,
                    launched=launched,
                    deaths=health.deaths,
                    last_death=health.last_death,
                    cause=health.cause,
                    patience=self.patience[name],
                )
            )
        return pools

    async def _halt(self, workers: Sequence[WorkerRecord]) -> None:
        """Obey the admin who stopped or resumed pools."""
        halted = await stopped(self.redis)
        self._halted = halted | await held(self.redis)
        for name, since in (await resumed(self.redis)).items():
            if name in self.health and self.health[name].last_death < since:
                self.health[name].deaths = 0
        for name in halted & self.launchers.keys():
            self._halts.begin(name, self._take_back)
        for worker in workers:
            # One that was not registered when its pool was stopped, since Redis was away, has not heard of it.
            if worker.pool in halted and worker.state == "serving":
                await self.registry.command(worker.worker_id, "drain")

    async def _take_back(self, name: str) -> None:
        try:
            await self._halts.in_thread(self.launchers[name].halt)
        except (EdifError, OSError) as error:
            logger.warning("what waits could not be taken back yet", pool=name, error=str(error))

    async def _bury(self) -> None:
        for name, launcher in self.launchers.items():
            self._gone += [(name, ended) for ended in await asyncio.to_thread(launcher.ended)]
        while self._gone:  # launchers tell of each once: while Redis is away none may be lost
            name, ended = self._gone[0]
            # Whoever ends a lineage takes back what waits in it: that is no person.
            if ended.cancelled and not (ended.waited and await self.lineages.ended(ended.waited)):
                await hold(self.redis, name)
                logger.warning("somebody cancelled an allocation: its pool starts no other", pool=name)
            self.health[name].note(ended, self.patience[name], time.time())
            logger.info(
                "worker ended", worker=ended.worker_id, status=ended.status, lived=round(ended.lived_seconds, 1)
            )
            del self._gone[0]
        for name, launcher in self.launchers.items():
            settled = time.time() - self.patience[name].young_seconds
            running = await asyncio.to_thread(launcher.launched)
            if any(launched.well and launched.launched < settled for launched in running):
                self.health[name].deaths = 0

    async def _act(self, decision: Decision) -> None:
        for name in decision.launch:
            self._launches.begin(name, self._launch)
        for target, sentence in decision.notes.items():
            await self.queue.note(await self.queue.waiting_for(target), Status.PROVISIONING, sentence)
        for target, sentence in decision.refusals.items():
            for request_id in await self.queue.waiting_for(target):
                await self.queue.withdraw(request_id, "", sentence, only_waiting=True)

    async def _launch(self, name: str) -> None:
        if not (self._is_leader and await self.leads()):
            return  # somebody else decides by now
        try:
            worker_id = await self._launches.in_thread(self.launchers[name].launch)
        except SlurmSilent as error:
            logger.info("not launched", pool=name, error=str(error))
        except (EdifError, OSError) as error:
            self.health[name].note(Ended("", 0.0, 1, str(error)), self.patience[name], time.time())
            logger.error("launch failed", pool=name, error=str(error))
            await write_health(self.redis, name, self.health[name])
        else:
            logger.info("worker launched", pool=name, worker=worker_id)
            await started(self.redis, name)

    async def _tell(self, pools: Sequence[Pool]) -> None:
        """Say why pools start nothing: in Redis, for `edif-hpc status`, and to the webhook what people must hear."""
        notices = {pool.name: notice_of(pool) for pool in pools}
        for name, notice in notices.items():
            if notice:
                await self.redis.hset(keys.NOTICES, f"pool:{name}", notice.sentence)
            else:
                await self.redis.hdel(keys.NOTICES, f"pool:{name}")
        for pool in pools:
            health = self.health[pool.name]
            health.paused = pool.paused
            if self._written.get(pool.name) != health:
                await write_health(self.redis, pool.name, health)
                self._written[pool.name] = health.model_copy()
        self.alerts.look(notices, time.time())


def _patience(pool: PoolSettings, settings: Settings) -> Patience:
    usual = ALLOCATIONS if pool.launcher == "slurm" else PROCESSES
    pauses = tuple(settings.fleet.backoff_seconds)
    return replace(usual, backoff_seconds=pauses) if pauses else usual


def _target(key: str, waiting: int, waited: float = 0.0) -> Target:
    try:
        found = Needed.parse(key)
    except EdifError:
        return Target(key, key, waiting, waited)
    repo_ids, models = tuple(each.repo_id for each in found.keys), tuple(map(str, found.keys))
    return Target(key, found.name, waiting, waited, repo_ids, models, found.pool)


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
