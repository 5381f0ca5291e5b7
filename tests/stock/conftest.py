"""One service per isolation level for all tests of this folder that need nothing special of it.

Starting one takes 5 to 10 s. Tests that need other settings, or a service of a certain age, start their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.stack import Stack, client_of, running

from . import support

LEVELS = ("none", "locked")
SETTINGS = """
adapters = ["edif-test/gpt2-lora"]
[worker]
threads = 1
idle_seconds = 3600
[limits]
payload_bytes = 16777216
result_bytes = 33554432
run_seconds = 120
"""


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2", "llama", "qwen3", "gpt2-lora"])


@pytest.fixture(
    scope="package", params=[pytest.param(level, marks=pytest.mark.xdist_group(f"stock-{level}")) for level in LEVELS]
)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp(f"stock-{request.param}") / "home"
    with running(home, cache, request.param, SETTINGS) as found:
        found.level = request.param
        yield found


@pytest.fixture
def stack(shared: Stack, cache: Path) -> Iterator[Stack]:
    """The shared service, and this process's nnsight as its client."""
    models.offline_client(cache)
    with client_of(shared):
        yield shared


@pytest.fixture
def gpt2(stack: Stack) -> Any:
    return support.tiny()
