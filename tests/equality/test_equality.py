"""The same program gives the same numbers locally and remotely, at every isolation level, for every architecture.

Arithmetic is the same on both sides (one thread, float32, the same kernels), so equality is exact; on a GPU it is as
near as `tests.support.device` says. Every case asserts the level that it really ran at: the service tells it in its
own record of the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from edif_hpc.core.isolation import Isolation
from tests.support import device, models
from tests.support.stack import Stack, client_of, running

from . import programs

pytestmark = pytest.mark.gpu

CAUSAL = ("gpt2", "llama", "qwen3", "gemma3", "mixtral")
OTHERS = ("t5", "qwen2.5-vl")
SETTINGS = """
[worker]
threads = 1
spares = 1
idle_seconds = 3600
"""

CASES = [(name, program) for name in CAUSAL for program in programs.EVERYWHERE + programs.CAUSAL] + [
    (name, program) for name in OTHERS for program in programs.EVERYWHERE
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), [*CAUSAL, *OTHERS])
    models.offline_client(hub)
    torch.set_num_threads(1)
    return hub


@pytest.fixture(
    scope="module", params=[pytest.param(level, marks=pytest.mark.xdist_group(level)) for level in Isolation]
)
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp(f"equality-{request.param}") / "home"
    with running(home, cache, request.param, SETTINGS) as found, client_of(found):
        found.level = request.param
        yield found


@pytest.fixture(scope="module")
def local(cache: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What each program gives here, computed once."""
    return {}


def expected(local: dict[tuple[str, str], dict[str, Any]], name: str, program: programs.Program) -> dict[str, Any]:
    from nnsight.modeling.transformers import TransformersModel

    for other in programs.EVERYWHERE + (programs.CAUSAL if name in CAUSAL else []):
        if (name, program.__name__) in local:
            break
        if (name, "model") not in local:
            model = TransformersModel(models.repo_id(name), task=models.task(name), dispatch=True, **device.local())
            # As the service does. While T5's position bias asks for a gradient, torch picks another attention kernel.
            model._module.requires_grad_(False)
            local[name, "model"] = model
        local[name, other.__name__] = other(local[name, "model"], name, {})
    return local[name, program.__name__]


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert device.equal(ours, theirs), (
            f"{where}: differs by up to {(ours.float().cpu() - theirs.float().cpu()).abs().max()}"
        )
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{n}]")
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(("name", "program"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_remote_equals_local(
    stack: Stack, local: dict[tuple[str, str], dict[str, Any]], name: str, program: programs.Program
) -> None:
    from nnsight.modeling.transformers import TransformersModel

    wanted = expected(local, name, program)
    remote = TransformersModel(models.repo_id(name), task=models.task(name))
    found = program(remote, name, {"remote": True})
    assert_same(found, wanted, f"{name}.{program.__name__}")
    asked = httpx.get(f"{stack.url}/api/requests", params={"limit": 1}, headers={"ndif-api-key": stack.key})
    (latest,) = asked.json()["requests"]
    assert latest["meta"]["isolation"] == stack.level
