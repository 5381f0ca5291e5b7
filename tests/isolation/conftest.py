"""One service per level for the whole table: short limits, one model, two users."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.isolation import client
from tests.isolation.ground import Ground, laid_out
from tests.support import models
from tests.support.stack import client_of, running

RUN_SECONDS = 5
SETTINGS = f"""
[worker]
threads = 1
spares = 1
idle_seconds = 3600
heartbeat_seconds = 1.0
[limits]
run_seconds = {RUN_SECONDS}
memory_bytes = {2**29}
result_bytes = {32 * 2**20}
log_lines = 100
attempts = 2
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2"])
    models.offline_client(hub)
    torch.set_num_threads(1)
    return hub


@pytest.fixture(scope="class")
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Ground]:
    level = request.cls.level
    home = tmp_path_factory.mktemp(f"isolation-{level}") / "home"
    folder = tmp_path_factory.mktemp(f"open-{level}") / "open"
    with running(home, cache, level, SETTINGS) as stack, client_of(stack):
        stack.level = level
        with laid_out(stack, folder) as found:
            yield found


@pytest.fixture(scope="class")
def another_user(ground: Ground) -> str:
    """The key of a second user: a home with one user trusts more."""
    return str(ground.stack.json("keys", "create", "somebody-else")["key"])


@pytest.fixture(scope="module")
def expected(cache: Path) -> Any:
    """The numbers of the honest request, computed here."""
    return client.numbers(client.tiny(dispatch=True))


@pytest.fixture
def model(ground: Ground) -> Any:
    return client.tiny()
