"""An admin's words about a pool: start, drain, and what `status` then says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.core.endpoints import Role, redis_endpoint
from edif_hpc.core.queue import keys
from edif_hpc.fleet.brake import STOPPED
from tests.support.servers import eventually
from tests.support.stack import Stack, running

from .reaching import of

pytestmark = pytest.mark.xdist_group("brake")

SETTINGS = """
[worker]
heartbeat_seconds = 0.5
[[pool]]
name = "desk"
launcher = "local"
max_workers = 1
"""


@pytest.fixture(scope="module")
def service(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("brake") / "home", cache, "process", SETTINGS) as found:
        yield found


def workers(service: Stack) -> list[str]:
    return [row["name"] for row in service.json("ps") if row["name"].startswith("worker-")]


def test_a_worker_is_started_and_drained_without_a_request(service: Stack) -> None:
    service.cli("pool", "start", "desk")
    eventually(lambda: service.json("pool", "list")[0]["workers"], 60, "a worker that nobody waited for")
    refused = service.cli("pool", "start", "desk", check=False)
    assert refused.returncode == 1
    assert "may have 1 workers and has 1" in refused.stderr
    assert "1 workers" in service.cli("pool", "drain", "desk").stdout
    eventually(lambda: not workers(service), 60, "its end")


def test_a_stopped_pool_says_so_and_starts_again_when_told(service: Stack) -> None:
    service.cli("pool", "stop", "desk")
    said = eventually(lambda: service.json("status")["notices"].get("pool:desk"), 30, "a notice")
    assert "edif-hpc pool resume desk" in said
    service.cli("pool", "start", "desk")
    eventually(lambda: service.json("pool", "list")[0]["workers"], 60, "a worker")
    eventually(lambda: not service.json("status")["notices"], 30, "silence about it")


def test_a_worker_that_nobody_told_hears_that_its_pool_was_stopped(service: Stack) -> None:
    """It was not registered then, since Redis was away."""
    if not workers(service):
        service.cli("pool", "start", "desk")
    eventually(lambda: service.json("pool", "list")[0]["workers"], 60, "a worker")
    asyncio.run(_stop_past_its_workers(service))
    eventually(lambda: not workers(service), 60, "its end")
    service.cli("pool", "resume", "desk")


async def _stop_past_its_workers(service: Stack) -> None:
    async with of(service, redis_endpoint, Role.GATEWAY).client() as redis:
        seen: Any = redis
        await seen.hset(keys.POOLS, "desk", STOPPED)


def test_an_unknown_pool_is_refused_with_those_there_are(service: Stack) -> None:
    for verb in ("start", "drain"):
        done = service.cli("pool", verb, "moon", check=False)
        assert done.returncode == 1
        assert "there are: desk" in done.stderr
