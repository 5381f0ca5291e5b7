"""One Redis, one S3 server and one gateway per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import redis_server, s3_server

from .scene import Scene, Worker, scene


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("gateway")
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        s3_server(tmp_path_factory.mktemp("store")) as store,
        scene(root / "home", redis, store) as found,
    ):
        yield found


@pytest.fixture
def worker(stage: Scene) -> Iterator[Worker]:
    with Worker(stage.redis, stage.store) as running:
        yield running
