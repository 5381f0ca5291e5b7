"""One installation, one version: components of two versions would misread each other's records."""

from __future__ import annotations

import asyncio
import os
import time

from redis.exceptions import RedisError

from edif_hpc import __version__
from edif_hpc.core.endpoints import Role, redis_endpoint
from edif_hpc.core.errors import ComponentError, Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings

from . import process

ANNOUNCED_SECONDS = 30.0
"""A component that has not announced itself for this long counts as gone."""


def refuse_running(home: Home, name: str) -> None:
    """Raise ComponentError when this home runs a component of that name already."""
    present = process.living(home, name)
    if present and present.pid != os.getpid():
        raise ComponentError(f"The {name} of {home.root} runs already (pid {present.pid}); see `edif-hpc ps`.")


def refuse_versions(home: Home, settings: Settings, name: str, role: Role = Role.GATEWAY) -> None:
    """Raise ComponentError when what lives behind this Redis is of another version.

    Redis being away is no refusal here: the component itself decides how long it waits for it.
    """
    try:
        other = asyncio.run(_other_version(home, settings, role))
    except (RedisError, OSError, Unavailable):
        return
    if other:
        who, version = other
        raise ComponentError(
            f"This {name} is of version {__version__} and the {who} that runs is of version {version}; "
            "install the same on both."
        )


async def _other_version(home: Home, settings: Settings, role: Role) -> tuple[str, str] | None:
    from edif_hpc.core.registry import Registry

    from .announce import announced

    redis = redis_endpoint(home, settings, role).client(retries=0)
    try:
        for name, record in (await announced(redis)).items():
            if time.time() - record["at"] < ANNOUNCED_SECONDS and record["version"] != __version__:
                return name, record["version"]
        for worker in await Registry(redis).workers():
            if worker.version != __version__:
                return worker.worker_id, worker.version
    finally:
        await redis.aclose()
    return None
