"""The pools of one installation, and the launcher of each. Without a `[[pool]]` there is one, of local processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edif_hpc.core.endpoints import redis_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings
from edif_hpc.core.tally import Command

from .local import Launcher, LocalLauncher
from .slurm.commands import Slurm
from .slurm.draft import order_for
from .slurm.launcher import SlurmLauncher
from .slurm.listing import Listing, beside
from .slurm.succession import succeed

LOCAL_POOL = "local"


def pools_of(settings: Settings) -> list[Pool]:
    """The pools that were described, else the implied one."""
    if settings.pool:
        return settings.pool
    return [
        Pool(
            name=LOCAL_POOL, launcher="local", max_workers=settings.fleet.workers,
            idle_seconds=settings.worker.idle_seconds,
        )
    ]  # fmt: skip


def launchers(
    home: Home, settings: Settings, config: Path | None, count: Callable[[Command], None]
) -> dict[str, Launcher]:
    """By pool. One listing of allocations serves them all; `count` is called at every command given to Slurm."""
    slurm = Slurm(settings.slurm, count)
    listing = Listing(slurm, home.root, run=beside)

    def launcher(pool: Pool) -> Launcher:
        if pool.launcher == "local":
            return LocalLauncher(home, pool.name)
        return SlurmLauncher(
            home,
            pool,
            listing,
            lambda name: order_for(home, settings, config, pool, name),
            lambda order, predecessor: succeed(home, redis_endpoint(home, settings), order, slurm, predecessor),
        )

    return {pool.name: launcher(pool) for pool in pools_of(settings)}
