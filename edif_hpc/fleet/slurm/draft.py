"""What the next allocation of a pool is told, from the settings as they are now: a lineage may outlive many of them."""

from __future__ import annotations

from pathlib import Path

from edif_hpc.core.errors import SettingsError
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings
from edif_hpc.fleet.network import meeting_points
from edif_hpc.fleet.state import settings_of

from .names import Name, tag
from .order import Order


def order_for(home: Home, settings: Settings, config: Path | None, pool: Pool, name: Name) -> Order:
    """The order for one allocation of this pool."""
    cache = Path(settings.models.cache).expanduser().absolute() if settings.models.cache else home.hub
    return Order(
        home=home.root,
        config=config.absolute() if config else None,
        pool=pool,
        slurm=settings.slurm,
        home_tag=tag(home.root),
        lineage=name.lineage,
        generation=name.generation,
        cache=cache,
        reached_at=",".join(meeting_points(settings)),
    )


def successor_of(order: Order) -> Order:
    """The order for the generation after this one, as an admin has the pool by now.

    Raises:
        SettingsError: the settings are wrong, or have no such pool of allocations any more.
    """
    home = Home(order.home)
    settings = settings_of(home, order.config).settings
    pool = next((each for each in settings.pool if each.name == order.pool.name and each.launcher == "slurm"), None)
    if pool is None:
        raise SettingsError(f"The settings have no pool {order.pool.name} of allocations any more.")
    return order_for(home, settings, order.config, pool, order.name.next)
