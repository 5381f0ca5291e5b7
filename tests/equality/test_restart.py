"""What is killed comes back, and gives the same numbers as before: the model host, and the whole worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import device, models
from tests.support.servers import eventually
from tests.support.stack import Stack, client_of, running

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("restart")]

SETTINGS = """
[worker]
threads = 1
spares = 1
heartbeat_seconds = 1
idle_seconds = 3600
"""


@pytest.fixture(scope="module", params=["none", "locked"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2"])
    models.offline_client(hub)
    home = tmp_path_factory.mktemp(f"restart-{request.param}") / "home"
    with running(home, hub, request.param, SETTINGS) as found, client_of(found):
        yield found


def logits() -> torch.Tensor:
    from nnsight.modeling.transformers import TransformersModel

    model = TransformersModel(models.repo_id("gpt2"), task="text-generation")
    with model.trace("The Eiffel Tower is located in the city of", remote=True):
        found = model.lm_head.output.save()
    return found  # noqa: RET504 - a save is read after the block


def hosts(stack: Stack) -> dict[str, int]:
    """Pids of the worker that holds the model and of its model host; empty while none is ready."""
    for worker in stack.json("status")["workers"]:
        for model in worker["models"]:
            if model["state"] == "ready":
                return {"worker": worker["pid"], "host": model["pids"]["host"]}
    return {}


@pytest.mark.parametrize("victim", ["host", "worker"])
def test_what_is_killed_comes_back_with_the_same_numbers(stack: Stack, victim: str) -> None:
    before = logits()
    killed: dict[str, Any] = eventually(lambda: hosts(stack), 60, "a ready model")
    os.kill(killed[victim], signal.SIGKILL)
    assert device.equal(logits(), before)
    after = eventually(lambda: hosts(stack), 60, "a ready model again")
    assert after[victim] != killed[victim]


def test_it_runs_where_it_was_told_to(stack: Stack, tmp_path: Path) -> None:
    logits()
    (worker,) = stack.json("status")["workers"]
    assert worker["device"] == device.first()
