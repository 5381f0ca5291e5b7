"""What `doctor` says of an external Redis that would lose or drop what was accepted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.home import Home
from tests.cli.stack import Stack
from tests.support.servers import redis_server


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisEndpoint]:
    with redis_server(tmp_path_factory.mktemp("redis")) as found:
        yield found


@pytest.mark.parametrize(
    ("changed", "state", "words"),
    [
        ({}, "warning", "it keeps nothing over a restart"),
        ({"save": "60 1"}, "ok", "keeps snapshots (save 60 1), and no append-only file"),
        ({"appendonly": "yes"}, "ok", "keeps an append-only file"),
        ({"maxmemory-policy": "allkeys-lru"}, "warning", "maxmemory-policy allkeys-lru"),
    ],
    ids=["neither", "snapshots", "append-only", "evicting"],
)
def test_a_redis_that_may_lose_requests_is_warned_of(
    redis: RedisEndpoint, tmp_path: Path, changed: dict[str, str], state: str, words: str
) -> None:
    async def configure() -> None:
        async with redis.client() as client:
            usual = {"save": "", "appendonly": "no", "maxmemory-policy": "noeviction"}
            for name, value in (usual | changed).items():
                await client.config_set(name, value)

    asyncio.run(configure())
    home = Home(tmp_path / "home").create()
    home.write_private(home.secrets / "redis", redis.password)
    home.config.write_text(f'[redis]\nurl = "{redis.url}"\npassword_file = "{home.secrets / "redis"}"\n')
    findings = json.loads(Stack(home.root).run("doctor", "--json", check=False).stdout)
    found = next(finding for finding in findings if finding["subject"] == "redis" and words in finding["found"])
    assert found["state"] == state
    assert bool(found["advice"]) is (state == "warning")
