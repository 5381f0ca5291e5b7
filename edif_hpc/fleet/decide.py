"""What to launch, and what to tell those who wait: a pure function of what is seen.

It must not know how a worker is launched: a pool may be processes on this machine or allocations from Slurm. Times are
seconds of one clock that the caller chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from edif_hpc.core.registry import WorkerRecord

DEEP_QUEUE = 8
"""Requests waiting per worker that holds the model, above which another worker is worth its start."""
MINUTE = 60.0


@dataclass(frozen=True)
class Patience:
    """How a pool takes deaths.

    Args:
        young_seconds: a worker that failed before this age died young.
        backoff_seconds: pauses after such deaths. One more death than there are pauses, and the pool is paused.
        pause_seconds: a paused pool is tried once more after this time, when somebody asks for it.
        wait_seconds: who waits longer than this for workers that are all busy gets one more.
    """

    young_seconds: float
    backoff_seconds: tuple[float, ...]
    pause_seconds: float
    wait_seconds: float


PROCESSES = Patience(30.0, (1.0, 5.0, 15.0), 60.0, wait_seconds=30.0)
ALLOCATIONS = Patience(60.0, (60.0, 300.0, 900.0, 3600.0), 6 * 3600.0, wait_seconds=120.0)
"""An allocation that fails costs queue time and other people's patience; one that starts takes minutes to serve."""


@dataclass(frozen=True)
class Launched:
    """A worker that was launched and has not ended. `launched` is when it began to run, `well` whether it came to
    serve, where that can be known."""

    worker_id: str
    launched: float
    well: bool = True


@dataclass(frozen=True)
class Pool:
    """What may be launched of one kind, and how that went lately.

    Args:
        least: workers that are kept also when nobody asks.
        stopped: by an admin, or since somebody cancelled an allocation: nothing is launched.
        asked: an admin wants one more worker.
        launching: one is being launched now, and is not among `launched` yet.
        pending: why what was launched has not started, in Slurm's words.
        trouble: why nobody knows what runs; then nothing is launched.
        models: repo ids or patterns that its workers may serve.
        deaths: workers in a row that died young; `last_death` is when the latest did, `cause` its last words.
    """

    name: str
    most: int
    least: int = 0
    stopped: bool = False
    asked: bool = False
    launching: bool = False
    pending: str = ""
    trouble: str = ""
    models: Sequence[str] = ("*",)
    launched: Sequence[Launched] = ()
    deaths: int = 0
    last_death: float = 0.0
    cause: str = ""
    patience: Patience = PROCESSES

    @property
    def paused(self) -> bool:
        return self.deaths > len(self.patience.backoff_seconds)

    def may_launch_at(self) -> float:
        """When the back-off lets the next worker start."""
        if not self.deaths:
            return 0.0
        patience = self.patience
        return self.last_death + (patience.pause_seconds if self.paused else patience.backoff_seconds[self.deaths - 1])

    @property
    def room(self) -> bool:
        return not (self.stopped or self.trouble or self.launching) and len(self.launched) < self.most

    def serves(self, target: Target) -> bool:
        """Whether its workers may: all models of the target, for requests that may be asked of this pool."""
        repo_ids = target.repo_ids or (target.repo_id,)
        return target.pool in ("", self.name) and all(
            any(fnmatchcase(repo_id, pattern) for pattern in self.models) for repo_id in repo_ids
        )


@dataclass(frozen=True)
class Target:
    """What requests wait for, one model or several; `waited` is for how many seconds the oldest of them has.

    Args:
        repo_id: the model's, for sentences and patterns; of several all, as `repo_ids` has them one by one.
        models: keys of several.
        pool: the only one that may serve it; empty: any.
    """

    key: str
    repo_id: str
    waiting: int
    waited: float = 0.0
    repo_ids: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    pool: str = ""


@dataclass
class Decision:
    """Pools to launch one worker of, and sentences by target: for those who wait on, and for those who need not."""

    launch: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


def decide(targets: Sequence[Target], workers: Sequence[WorkerRecord], pools: Sequence[Pool], now: float) -> Decision:
    """Look at who waits, who serves and what may be launched."""
    decision = Decision()
    for target in targets:
        _consider(target, workers, pools, now, decision)
    for pool in pools:
        wanted = pool.asked or len(pool.launched) < pool.least
        if wanted and pool.room and pool.may_launch_at() <= now:
            decision.launch.append(pool.name)
    decision.launch = list(dict.fromkeys(decision.launch))
    return decision


def _consider(
    target: Target, workers: Sequence[WorkerRecord], pools: Sequence[Pool], now: float, decision: Decision
) -> None:
    serving = [worker for worker in workers if worker.state != "draining"]
    reached = _reached(target, serving, pools)
    unable = {worker.pool for worker in workers if target.key in worker.unable}
    able = [pool for pool in pools if pool.serves(target) and pool.name not in unable]
    if reached.served and not reached.deep:
        able = [pool for pool in able if reached.busy and target.waited > pool.patience.wait_seconds]
    if reached.served and not able:
        return
    known = {worker.worker_id for worker in workers}  # one that drains has started long ago
    starting = [pool for pool in able if pool.launching or any(each.worker_id not in known for each in pool.launched)]
    if starting:
        if not reached.served:
            decision.notes[target.key] = _starting(starting[0])
        return
    with_room = [pool for pool in able if pool.room and pool.name not in decision.launch]
    ready = [pool for pool in with_room if pool.may_launch_at() <= now]
    if ready:
        decision.launch.append(ready[0].name)
        if not reached.served:
            decision.notes[target.key] = "A worker is being started."
    elif not reached.served:
        _explain(target, able, with_room, reached, now, decision)


def _starting(pool: Pool) -> str:
    if pool.pending:
        return f"An allocation of the pool {pool.name} waits in Slurm ({pool.pending})."
    return "A worker is starting."


@dataclass(frozen=True)
class _Reach:
    """`busy`: all who hold the model have it ready, so that no wait is one for a worker that starts. `failures`: of
    workers that could not load it; `unable`: of those that cannot hold all of several, where another pool's may."""

    served: bool
    deep: bool
    busy: bool
    failures: list[str]
    unable: list[str]


def _reached(target: Target, serving: Sequence[WorkerRecord], pools: Sequence[Pool]) -> _Reach:
    """Whether a live worker has, loads or can load the model; whether those are too few; and who failed to."""
    patterns = {pool.name: pool for pool in pools}
    holding, loading, free = 0, 0, 0
    failures: list[str] = []
    unable: list[str] = []
    for worker in serving:
        pool = patterns.get(worker.pool)
        if target.key in worker.unable:
            unable.append(worker.unable[target.key])
            continue
        if (pool and not pool.serves(target)) or target.pool not in ("", worker.pool):
            continue
        keys = target.models or (target.key,)
        held = [model for model in worker.models if model.model_key in keys]
        if failed := [model for model in held if model.state == "failed"]:
            failures.append(failed[0].error)
        elif len(held) == len(keys):
            holding += 1
            loading += any(model.state == "loading" for model in held)
        elif not worker.running or worker.state == "starting":
            free += 1
    deep = target.waiting > DEEP_QUEUE * max(1, holding + free)
    # A busy worker without the model makes room for it in time, so nobody waits in vain; a free place is sooner.
    others = len(serving) - holding - free - len(failures) - len(unable)
    return _Reach(
        served=holding + free > 0 or (others > 0 and not _room(pools)),
        deep=deep,
        busy=holding > 0 and not loading and not free,
        failures=failures,
        unable=unable,
    )


def _room(pools: Sequence[Pool]) -> bool:
    return any(pool.room for pool in pools)


def _explain(
    target: Target,
    able: Sequence[Pool],
    with_room: Sequence[Pool],
    reached: _Reach,
    now: float,
    decision: Decision,
) -> None:
    paused = [pool for pool in with_room if pool.paused]
    waiting = [pool for pool in with_room if not pool.paused]
    if waiting:
        soon = min(pool.may_launch_at() for pool in waiting) - now
        decision.notes[target.key] = (
            f"The last worker ended early ({waiting[0].cause}); another is started in {_roughly(soon)}."
        )
    elif paused:
        decision.refusals[target.key] = (
            f"No worker can be started: the last {paused[0].deaths} ended within "
            f"{paused[0].patience.young_seconds:g} s, the latest with: {paused[0].cause}"
        )
    elif reached.failures:
        decision.refusals[target.key] = reached.failures[0]
    elif not able:
        nowhere = f"No pool of this service serves {target.repo_id}."
        decision.refusals[target.key] = reached.unable[0] if reached.unable else nowhere
    elif all(pool.stopped for pool in able):
        decision.notes[target.key] = (
            f"The pool {able[0].name} starts no workers now, since an admin stopped it or somebody cancelled an "
            "allocation; your request waits for it."
        )
    elif any(pool.trouble for pool in able):
        silent = next(pool for pool in able if pool.trouble)
        own = f"The last worker ended early ({silent.cause.rstrip('.')}). " if silent.deaths else ""
        told = f"Nothing can be started until Slurm answers ({silent.trouble.rstrip('.')})."
        decision.notes[target.key] = own + told
    elif not any(pool.most for pool in able):
        decision.notes[target.key] = (
            f"No worker runs, and this service starts none by itself (the pool {able[0].name} may have 0)."
        )
    else:
        decision.notes[target.key] = "Waiting for a worker to end, since no more may run."


def _roughly(seconds: float) -> str:
    """A time in words that change seldom: each change is told to everybody who waits, and kept."""
    return "less than a minute" if seconds < MINUTE else f"about {math.ceil(seconds / MINUTE)} min"
