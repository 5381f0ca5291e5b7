"""What the settings name and this machine can look for before anything starts: images, and servers that are not ours.

Where it cannot look it says nothing: an image may lie where compute nodes alone see it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from edif_hpc.core.endpoints import RedisEndpoint, redis_endpoint, store_endpoint
from edif_hpc.core.errors import ComponentError, SettingsError, Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings


def refuse_missing_images(settings: Settings) -> None:
    """Raise SettingsError when an image is not in a folder that is here."""
    for pool in settings.pool:
        if missing(pool):
            raise SettingsError(
                f"There is no image {pool.image}, which pool.{pool.name}.image names, though its folder is here; build "
                f"it with `edif-hpc image build`, or name another."
            )


def missing(pool: Pool) -> bool:
    """Whether this machine sees where the pool's image should be, and that it is not there."""
    image = Path(pool.image)
    try:
        return bool(pool.image) and image.parent.is_dir() and not image.exists()
    except OSError:  # a folder that others may look into, perhaps
        return False


def refuse_silent_servers(home: Home, settings: Settings) -> None:
    """Raise ComponentError when an external Redis or store does not let us in: without them nothing is up."""
    if settings.redis.url:
        endpoint = redis_endpoint(home, settings)
        try:
            asyncio.run(_ping(endpoint))
        except (RedisError, OSError) as error:
            raise ComponentError(
                f"The Redis at {endpoint.address}, which redis.url names, does not let this service in: "
                f"{str(error).rstrip('.')}."
            ) from None
    if settings.store.endpoint:
        from edif_hpc.core.store import Store  # boto3 takes a third of a second, and the embedded store needs none here

        try:
            Store(store_endpoint(home, settings)).ensure_bucket()
        except Unavailable as error:
            raise ComponentError(
                f"{str(error).rstrip('.')}; see store.endpoint, store.bucket and store.credentials_file."
            ) from None


async def _ping(endpoint: RedisEndpoint) -> None:
    client: Any = endpoint.client(retries=0, connections=1)
    async with client as redis:
        await redis.ping()
