"""Start the fleet: one launcher per pool, then its loop until a signal."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.endpoints import redis_endpoint, store_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store, in_thread

from .fleet import Fleet
from .pools import launchers, pools_of

logger = log.get("fleet")


def serve(home: Home, settings: Settings, config: Path | None = None) -> None:
    """Run the fleet in the foreground until SIGTERM or SIGINT. Workers it launched live on."""
    log.configure("fleet", settings.log_level)
    asyncio.run(_serve(home, settings, config))


async def _serve(home: Home, settings: Settings, config: Path | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    redis = redis_endpoint(home, settings).client()
    store = Store(store_endpoint(home, settings))
    if settings.store.endpoint:
        await _ensure_bucket(store)
    fleet = Fleet(settings, redis, store, pools_of(settings), launchers(home, settings, config))
    logger.info("serving", pools=list(fleet.launchers))
    try:
        await fleet.run(stop)
    finally:
        await redis.aclose()


async def _ensure_bucket(store: Store) -> None:
    """An external store gets its bucket now; the embedded one makes it with the first object."""
    try:
        await in_thread(store.ensure_bucket)
    except Unavailable as error:
        logger.warning("the bucket could not be opened", error=str(error))
