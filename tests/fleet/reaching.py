"""Asking the servers of a home that is reached at an address, in one role or the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from redis.asyncio import Redis

from edif_hpc.core.endpoints import Role, redis_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.fleet.state import settings_of
from tests.support.stack import Stack

T = TypeVar("T")


def of(stack: Stack, endpoint: Callable[[Home, Settings, Role], T], role: Role = Role.GATEWAY) -> T:
    home = Home(stack.home)
    return endpoint(home, settings_of(home).settings, role)


def tries(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Unavailable:
        return False
    return True


def ports_of(stack: Stack) -> dict[str, int]:
    found: dict[str, int] = json.loads((stack.home / "run" / "ports.json").read_text())
    return found


def in_redis(stack: Stack, role: Role, work: Callable[[Redis], Awaitable[T]], **changed: Any) -> T:
    endpoint = replace(of(stack, redis_endpoint, role), **changed)

    async def run() -> T:
        redis = endpoint.client(retries=0)
        try:
            return await work(redis)
        finally:
            await redis.aclose()

    return asyncio.run(run())
