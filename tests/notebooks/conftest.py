"""One service for the notebooks and the scripts of the examples, at the strictest isolation, with both models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import Stack

from . import kernel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/notebooks/"):
            item.add_marker(pytest.mark.xdist_group("notebooks"))


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Path]]:
    """The service, and its Hugging Face cache."""
    with kernel.service(tmp_path_factory.mktemp("notebooks")) as found:
        yield found
