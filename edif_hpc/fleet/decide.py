"""What to launch, and what to tell those who wait: a pure function of what is seen.

It must not know how a worker is launched: a pool may be processes on this machine or allocations from Slurm. Times are
seconds of one clock that the caller chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from edif_hpc.core.registry import WorkerRecord

BACKOFF_SECONDS = (1.0, 5.0, 15.0)
"""Pauses after a worker that died young. One more death than there are pauses, and the pool is paused."""
PAUSE_SECONDS = 60.0
"""A paused pool is tried once more after this time, when somebody asks for it."""
YOUNG_SECONDS = 30.0
DEEP_QUEUE = 8
"""Requests waiting per worker that holds the model, above which another worker is worth its start."""


@dataclass(frozen=True)
class Launched:
    """A worker that was launched and has not ended. `launched` is when."""

    worker_id: str
    launched: float


@dataclass(frozen=True)
class Pool:
    """What may be launched of one kind, and how that went lately.

    Args:
        models: repo ids or patterns that its workers may serve.
        deaths: workers in a row that died young; `last_death` is when the latest did, `cause` its last words.
    """

    name: str
    most: int
    models: Sequence[str] = ("*",)
    launched: Sequence[Launched] = ()
    deaths: int = 0
    last_death: float = 0.0
    cause: str = ""

    @property
    def paused(self) -> bool:
        return self.deaths > len(BACKOFF_SECONDS)

    def may_launch_at(self) -> float:
        """When the back-off lets the next worker start."""
        if not self.deaths:
            return 0.0
        pause = PAUSE_SECONDS if self.paused else BACKOFF_SECONDS[self.deaths - 1]
        return self.last_death + pause

    def serves(self, repo_id: str) -> bool:
        return any(fnmatchcase(repo_id, pattern) for pattern in self.models)


@dataclass(frozen=True)
class Target:
    """A model that requests wait for."""

    key: str
    repo_id: str
    waiting: int


@dataclass
class Decision:
    """Pools to launch one worker of, and sentences by target: for those who wait on, and for those who need not."""

    launch: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


def decide(targets: Sequence[Target], workers: Sequence[WorkerRecord], pools: Sequence[Pool], now: float) -> Decision:
    """Look at who waits, who serves and what may be launched."""
    decision = Decision()
    serving = [worker for worker in workers if worker.state != "draining"]
    for target in targets:
        _consider(target, serving, pools, now, decision)
    return decision


def _consider(
    target: Target, serving: Sequence[WorkerRecord], pools: Sequence[Pool], now: float, decision: Decision
) -> None:
    reached = _reached(target, serving, pools)
    if reached.served and not reached.deep:
        return
    able = [pool for pool in pools if pool.serves(target.repo_id)]
    known = {worker.worker_id for worker in serving}
    if any(launched.worker_id not in known for pool in able for launched in pool.launched):
        if not reached.served:
            decision.notes[target.key] = "A worker is starting."
        return
    with_room = [pool for pool in able if len(pool.launched) < pool.most and pool.name not in decision.launch]
    ready = [pool for pool in with_room if pool.may_launch_at() <= now]
    if ready:
        decision.launch.append(ready[0].name)
        if not reached.served:
            decision.notes[target.key] = "A worker is being started."
    elif not reached.served:
        _explain(target, able, with_room, reached.failures, now, decision)


@dataclass(frozen=True)
class _Reach:
    served: bool
    deep: bool
    failures: list[str]


def _reached(target: Target, serving: Sequence[WorkerRecord], pools: Sequence[Pool]) -> _Reach:
    """Whether a live worker has, loads or can load the model; whether those are too few; and who failed to."""
    patterns = {pool.name: pool for pool in pools}
    holding, free, failures = 0, 0, []
    for worker in serving:
        pool = patterns.get(worker.pool)
        if pool and not pool.serves(target.repo_id):
            continue
        model = next((model for model in worker.models if model.model_key == target.key), None)
        if model and model.state == "failed":
            failures.append(model.error)
        elif model:
            holding += 1
        elif not worker.running or worker.state == "starting":
            free += 1
    deep = target.waiting > DEEP_QUEUE * max(1, holding + free)
    # A busy worker without the model makes room for it in time, so nobody waits in vain; a free place is sooner.
    busy = len(serving) - holding - free - len(failures)
    return _Reach(served=holding + free > 0 or (busy > 0 and not _room(pools)), deep=deep, failures=failures)


def _room(pools: Sequence[Pool]) -> bool:
    return any(len(pool.launched) < pool.most for pool in pools)


def _explain(
    target: Target,
    able: Sequence[Pool],
    with_room: Sequence[Pool],
    failures: Sequence[str],
    now: float,
    decision: Decision,
) -> None:
    paused = [pool for pool in with_room if pool.paused]
    waiting = [pool for pool in with_room if not pool.paused]
    if waiting:
        soon = min(pool.may_launch_at() for pool in waiting) - now
        decision.notes[target.key] = (
            f"The last worker ended early ({waiting[0].cause}); another is started in {max(1, round(soon))} s."
        )
    elif paused:
        decision.refusals[target.key] = (
            f"No worker can be started: the last {paused[0].deaths} ended within {YOUNG_SECONDS:g} s, the latest "
            f"with: {paused[0].cause}"
        )
    elif failures:
        decision.refusals[target.key] = failures[0]
    elif not able:
        decision.refusals[target.key] = f"No pool of this service serves {target.repo_id}."
    elif not any(pool.most for pool in able):
        decision.notes[target.key] = "No worker runs, and this service starts none by itself (fleet.workers is 0)."
    else:
        decision.notes[target.key] = "Waiting for a worker to end, since no more may run."
