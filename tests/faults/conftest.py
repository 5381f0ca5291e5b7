"""One service, one set of packed blocks and one gate for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.stock import support
from tests.support import models
from tests.support.stack import Stack, client_of

from .flight import Block, Flight, packed
from .scene import reference, service


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2"])
    models.offline_client(found)
    return found


@pytest.fixture(scope="package")
def logits(cache: Path) -> torch.Tensor:
    return reference()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    with service(tmp_path_factory.mktemp("faults") / "home", cache) as found, client_of(found):
        yield found


@pytest.fixture(scope="module")
def blocks(stack: Stack, logits: torch.Tensor) -> list[Block]:
    return packed(support.tiny(), gate_of(stack), logits)


@pytest.fixture
def flight(stack: Stack, blocks: list[Block]) -> Flight:
    """All blocks, sent and waiting at the gate."""
    return Flight(stack, blocks, gate_of(stack))


def gate_of(stack: Stack) -> Path:
    return stack.home / "gate"
