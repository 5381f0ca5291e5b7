"""One service and one object store for the tests of this folder that need nothing special of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stock import support
from tests.support import models
from tests.support.servers import S3Process
from tests.support.stack import Stack, client_of

from .scene import service


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Process]:
    found = S3Process(tmp_path_factory.mktemp("store"))
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, cache: Path, store: S3Process) -> Iterator[Stack]:
    with service(tmp_path_factory.mktemp("delivery") / "home", cache, store) as found:
        yield found


@pytest.fixture
def stack(shared: Stack, cache: Path) -> Iterator[Stack]:
    """The service, and this process's nnsight as its client."""
    models.offline_client(cache)
    with client_of(shared):
        yield shared


@pytest.fixture
def gpt2(stack: Stack) -> Any:
    return support.tiny()


@pytest.fixture
def gate(stack: Stack) -> Iterator[Path]:
    """A file that lets held requests go on."""
    path = stack.home / "gate"
    yield path
    path.unlink(missing_ok=True)
