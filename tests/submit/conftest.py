"""One service per isolation level for all tests of this folder, and the command line of somebody who only has a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import models
from tests.support.stack import Stack, running

from .laptop import Laptop

LEVELS = ("none", "locked")
"""What lies between them has less locked, and no way of its own."""
NAMES = ["gpt2", "llama", "gpt2-lora"]
SETTINGS = f"""
adapters = ["edif-test/gpt2-lora"]
[worker]
threads = 1
idle_seconds = 3600
heartbeat_seconds = 1.0
[limits]
memory_bytes = {2**30}
result_bytes = {32 * 2**20}
run_seconds = 60
script_seconds = 120
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_cache(tmp_path_factory.mktemp("hf"), NAMES)


def service(level: str, cache: Path, factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(factory.mktemp(f"submit-{level}") / "home", cache, level, SETTINGS) as found:
        found.level = level
        yield found


@pytest.fixture(
    scope="package", params=[pytest.param(level, marks=pytest.mark.xdist_group(f"submit-{level}")) for level in LEVELS]
)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    yield from service(request.param, cache, tmp_path_factory)


@pytest.fixture
def laptop(stack: Stack, cache: Path, tmp_path: Path) -> Laptop:
    return Laptop(tmp_path, stack.url, stack.key, cache, stack.level)
