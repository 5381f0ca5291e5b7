"""One service for all tests of this folder, and this process connected to it through our own client."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edif_hpc
from tests.support import models
from tests.support.proxy import Proxy, proxied
from tests.support.stack import Stack, client_of, running

SETTINGS = """
[worker]
threads = 1
idle_seconds = 3600
"""
GATEWAY = "link_seconds = 2"
"""Links that soon expire, as they do for results that are fetched on another day."""
PROMPT = "The Eiffel Tower is located in the city of"
REPO = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/client/"):
            item.add_marker(pytest.mark.xdist_group("client"))


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2"])


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    models.offline_client(cache)
    with running(tmp_path_factory.mktemp("client") / "home", cache, "process", SETTINGS, gateway=GATEWAY) as found:
        yield found


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results lie while they are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edif-hpc" / "results"


@pytest.fixture
def stack(service: Stack, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """The service, and this process's nnsight connected to it."""
    with client_of(service):
        monkeypatch.setattr("nnsight.schema.config.CONFIG.APP.REMOTE_LOGGING", True)
        edif_hpc.connect(service.url, service.key)
        yield service
        edif_hpc.disconnect()


@pytest.fixture
def gpt2(stack: Stack) -> Any:
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(models.repo_id("gpt2"), task="text-generation")


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    """A misbehaving line to the service, and this process connected over it."""
    with proxied(stack.url) as between:
        edif_hpc.connect(between.url, stack.key)
        yield between


@pytest.fixture
def child(stack: Stack, cache: Path, tmp_path: Path) -> Callable[..., Any]:
    """Start another process of the same user: `child(script)`, with what `subprocess.Popen` takes."""
    numbers = itertools.count()

    @contextmanager
    def start(script: str, url: str = "", **options: Any) -> Iterator[subprocess.Popen[str]]:
        file = tmp_path / f"script{next(numbers)}.py"  # nnsight reads blocks back from their file
        file.write_text(script)
        environment = {
            **os.environ,
            "NDIF_HOST": url or stack.url,
            "NDIF_API_KEY": stack.key,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPO),
            "PYTHONWARNINGS": "error",
        }
        process = subprocess.Popen([sys.executable, str(file)], env=environment, text=True, **options)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    return start
