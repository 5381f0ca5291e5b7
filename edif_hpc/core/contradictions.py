"""What settings of different sections have against each other: refused at start, since alone each of them is right.

Pure; what one section can tell by itself is refused where it is described.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .isolation import Isolation

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True)
class Contradiction:
    """`key` and `value` of the setting that is refused, and what the others have against it, a clause."""

    key: str
    value: str
    trouble: str


def first(settings: Settings) -> Contradiction | None:
    """The first of them; None: the settings go together."""
    return next((found for check in (_ranks, _levels, _pools) for found in check(settings)), None)


def _ranks(settings: Settings) -> Iterator[Contradiction]:
    """Models on several ranks."""
    ranks = settings.models.tensor_parallel
    if ranks == 1:
        return
    for trouble in (*_levels_against_ranks(settings), *_gpus_against_ranks(settings)):
        yield Contradiction("models.tensor_parallel", str(ranks), trouble)
    if settings.models.adapters:
        said = "models on several ranks take no adapters, so far, and models.adapters names some; empty that list"
        yield Contradiction("models.tensor_parallel", str(ranks), said)


def _levels_against_ranks(settings: Settings) -> Iterator[str]:
    worker = settings.worker
    levels = {"worker.isolation": worker.isolation, "worker.required_isolation": worker.required_isolation}
    levels |= {f"pool.{pool.name}.isolation": pool.isolation for pool in settings.pool if pool.isolation}
    for key, level in levels.items():
        if level is not Isolation.NONE:
            said = f"{key} is {level}" if level else f"{key} is empty, which means the strongest level"
            yield f"models on several ranks are served at isolation none only, so far, and {said}; set it to none"


def _gpus_against_ranks(settings: Settings) -> Iterator[str]:
    ranks = settings.models.tensor_parallel
    for pool in settings.pool:
        if pool.accelerator != "cpu" and pool.gpu_count is not None and pool.gpu_count < ranks:
            yield f"an allocation of the pool {pool.name} has {pool.gpu_count} GPUs; ask for {ranks} by gres or gpus"


def _levels(settings: Settings) -> Iterator[Contradiction]:
    """A level to run at that is below one that is demanded."""
    level, demanded = settings.worker.isolation, settings.worker.required_isolation
    if level is None:
        return
    if not level.covers(demanded):
        trouble = f"worker.required_isolation demands {demanded}; raise the one or lower the other"
        yield Contradiction("worker.isolation", level, trouble)
    for pool in settings.pool:
        if pool.isolation and not level.covers(pool.isolation):
            trouble = f"worker.isolation is {level}, at which all workers run; raise it, or leave it empty"
            yield Contradiction(f"pool.{pool.name}.isolation", pool.isolation, trouble)


def _pools(settings: Settings) -> Iterator[Contradiction]:
    """A device that a pool's allocations are not for."""
    device = settings.worker.device
    for pool in settings.pool:
        wanted = "cpu" if device == "cpu" else "" if device == "auto" else "a GPU"
        if pool.launcher == "slurm" and wanted and (wanted == "cpu") != (pool.accelerator == "cpu"):
            trouble = f"worker.device is {device}, on which all workers compute; leave it at auto"
            yield Contradiction(f"pool.{pool.name}.accelerator", pool.accelerator, trouble)
