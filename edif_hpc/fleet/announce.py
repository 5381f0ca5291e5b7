"""Components other than workers, as they announce themselves in Redis: name -> host, pid, version and when."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from redis.asyncio import Redis

from edif_hpc import __version__
from edif_hpc.core.queue import keys


async def announce(redis: Redis, name: str) -> None:
    """Say that this process is a component and lives."""
    record = {"host": socket.gethostname(), "pid": os.getpid(), "version": __version__, "at": time.time()}
    client: Any = redis
    await client.hset(keys.COMPONENTS, name, json.dumps(record))


async def leave(redis: Redis, name: str) -> None:
    client: Any = redis
    await client.hdel(keys.COMPONENTS, name)


async def announced(redis: Redis) -> dict[str, dict[str, Any]]:
    client: Any = redis
    found = await client.hgetall(keys.COMPONENTS)
    return {name.decode(): json.loads(value) for name, value in found.items()}
