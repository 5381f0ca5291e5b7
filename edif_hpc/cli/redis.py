"""A connection to the Redis of a home for one command, with its absence as a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from edif_hpc.core.home import Home

T = TypeVar("T")


def with_redis(place: Home, work: Callable[[Redis], Awaitable[T]]) -> T:
    """Run `work` with a client that is closed afterwards.

    Raises:
        Unavailable: Redis does not answer.
    """
    from redis.exceptions import RedisError

    from edif_hpc.core.endpoints import redis_endpoint
    from edif_hpc.core.errors import Unavailable

    from .context import settings_for

    endpoint = redis_endpoint(place, settings_for(place).settings)

    async def run() -> T:
        redis = endpoint.client(retries=0)
        try:
            return await work(redis)
        finally:
            await redis.aclose()

    try:
        return asyncio.run(run())
    except (RedisError, OSError) as error:
        why = str(error).rstrip(".")
        raise Unavailable(
            f"Redis at {endpoint.address} does not answer ({why}); is the service up? See `edif-hpc ps`."
        ) from None


def with_redis_if_up(place: Home, work: Callable[[Redis], Awaitable[T]], otherwise: T) -> T:
    """The same, for what is also worth showing while the service is down."""
    from edif_hpc.core.errors import EdifError

    try:
        return with_redis(place, work)
    except EdifError:
        return otherwise
