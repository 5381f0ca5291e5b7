"""Start the fleet: one launcher per pool, then its loop until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from edif_hpc.core import log
from edif_hpc.core.endpoints import redis_endpoint, store_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home, read_secret
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store, in_thread
from edif_hpc.core.tally import Tally

from .fleet import Fleet
from .flush import keep_flushed
from .notices import Alerts
from .pools import launchers, pools_of

BUCKET_PAUSE_SECONDS = 2.0
"""At first for an embedded store that starts at the same time; then between two tries, and longer each time."""
BUCKET_LONGEST_SECONDS = 60.0
BOOKS_SECONDS = 5.0
BOOKS_END_SECONDS = 2.0
"""Between two writings of how many commands Slurm was given, and how long the last one may take."""

logger = log.get("fleet")


def serve(home: Home, settings: Settings, config: Path | None = None) -> None:
    """Run the fleet in the foreground until SIGTERM or SIGINT. Workers it launched live on."""
    log.configure("fleet", settings.log_level)
    file = settings.fleet.alert_url_file
    alerts = Alerts(read_secret(Path(file).expanduser()) if file else "", str(home.root))
    asyncio.run(_serve(home, settings, config, alerts))


async def _serve(home: Home, settings: Settings, config: Path | None, alerts: Alerts) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    redis = redis_endpoint(home, settings).client()
    store = Store(store_endpoint(home, settings))
    tally = Tally()
    beside = [asyncio.create_task(_ensure_bucket(store)), asyncio.create_task(keep_books(tally, redis))]
    if not settings.redis.url:
        beside.append(asyncio.create_task(keep_flushed(home.redis)))
    fleet = Fleet(settings, redis, store, pools_of(settings), launchers(home, settings, config, tally.count), alerts)
    logger.info("serving", pools=list(fleet.launchers))
    try:
        await fleet.run(stop)
    finally:
        for task in beside:
            task.cancel()
        with contextlib.suppress(RedisError, OSError):  # then the last few are not in the books
            async with asyncio.timeout(BOOKS_END_SECONDS):
                await tally.write(redis)
        await redis.aclose()


async def keep_books(tally: Tally, redis: Redis) -> None:
    """Write what was counted every few seconds. What Redis does not take is kept for the next time."""
    while True:
        await asyncio.sleep(BOOKS_SECONDS)
        with contextlib.suppress(RedisError, OSError):
            await tally.write(redis)


async def _ensure_bucket(store: Store) -> None:
    """Make the bucket: workers may not, and keep their results until it is there."""
    pause = BUCKET_PAUSE_SECONDS
    while True:
        await asyncio.sleep(pause)
        try:
            await in_thread(store.ensure_bucket)
        except Unavailable as error:
            logger.warning("the bucket could not be opened", error=str(error))
            pause = min(2 * pause, BUCKET_LONGEST_SECONDS)
        else:
            return
