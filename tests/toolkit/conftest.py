"""One service for all tests of this folder, at the strictest isolation, and the models that they compare."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edif_hpc
from tests.support import models
from tests.support.stack import Stack, client_of, running

TINY = ("gpt2", "qwen3", "gemma3")
EXPECTED: dict[str, Any] = tomllib.loads(Path(__file__).with_name("expected.toml").read_text())
"""Written by hand; no test writes it."""
SETTINGS = f"""
[models.dtype]
"{EXPECTED["model"]["repo"]}" = "float32"
[worker]
threads = 1
idle_seconds = 3600
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/toolkit/"):
            item.add_marker(pytest.mark.xdist_group("toolkit"))


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    hub = models.build_cache(root, [*TINY, "mixtral"])
    models.smollm2(root)
    models.offline_client(hub)
    return hub


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("toolkit") / "home", cache, "locked", SETTINGS) as found:
        yield found


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as the service computes with: another number adds in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="package")
def loaded(cache: Path) -> Iterator[Any]:
    """`loaded(name)`: a model with weights in this process, eager attention, float32; each once."""
    import torch
    from nnsight.modeling.transformers import TransformersModel

    found: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in found:
            found[name] = TransformersModel(
                name, task="text-generation", dtype=torch.float32, attn_implementation="eager", dispatch=True
            )
            found[name]._module.requires_grad_(False)  # as at a service
        return found[name]

    with one_thread():
        yield model


@pytest.fixture(scope="package")
def shape(cache: Path) -> Any:
    """`shape(name)`: the same without weights, as a client has it."""
    from nnsight.modeling.transformers import TransformersModel

    def model(name: str) -> Any:
        return TransformersModel(name, task="text-generation", attn_implementation="eager")

    return model


@pytest.fixture
def stock(service: Stack) -> Iterator[Stack]:
    """The service, and this process's stock nnsight pointed at it."""
    with client_of(service):
        yield service


@pytest.fixture
def connected(service: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """The service, reached through the project's own client."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with client_of(service):
        edif_hpc.connect(service.url, service.key, progress=False)
        yield service
        edif_hpc.disconnect()


@pytest.fixture(scope="package")
def smol(loaded: Any) -> Any:
    return loaded(EXPECTED["model"]["repo"])
