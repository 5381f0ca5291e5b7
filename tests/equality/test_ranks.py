"""A model on two ranks gives what it gives on one: all that is split is seen whole, edited whole, and differentiated.

Two ranks add in another order than one, so numbers are equal up to rounding, and generated tokens exactly. The service
is a real one, of CPU workers whose ranks talk over gloo; NCCL and RCCL were not run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support import models
from tests.support.stack import Stack, client_of, running

from . import programs

pytestmark = pytest.mark.xdist_group("ranks")

NAMES = ("llama", "qwen3")
RTOL = 1e-4
SETTINGS = """
tensor_parallel = 2
[worker]
threads = 1
idle_seconds = 3600
"""
WHOLE = [program for program in programs.EVERYWHERE + programs.CAUSAL if program is not programs.source]
"""Inside a split module `.source` shows a rank's own part, which a request may not save: see tests/worker."""
CASES = [(name, program) for name in NAMES for program in WHOLE + programs.IN_PARTS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), [*NAMES, "gpt2"])
    models.offline_client(hub)
    torch.set_num_threads(1)
    return hub


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("equality-ranks") / "home"
    with running(home, cache, "none", SETTINGS) as found, client_of(found):
        yield found
        ranks = [process for process in below_workers(found) if "edif_hpc.worker." in " ".join(process.cmdline())]
        assert len(ranks) == 2 * len(NAMES)  # every model has a host and another rank
    assert not psutil.wait_procs(ranks, timeout=10)[1]  # `down` has left none


@pytest.fixture(scope="module")
def one_rank(cache: Path) -> dict[str, Any]:
    """The models in this process, loaded as the service does."""
    from nnsight.modeling.transformers import TransformersModel

    loaded = {}
    for name in NAMES:
        loaded[name] = TransformersModel(models.repo_id(name), task=models.task(name), dispatch=True)
        loaded[name]._module.requires_grad_(False)
    return loaded


def below_workers(stack: Stack) -> list[psutil.Process]:
    """What the workers of this service have started, and what that has."""
    rows = [psutil.Process(row["pid"]) for row in stack.json("ps") if row["models"]]
    return list({child for row in rows for child in row.children(recursive=True)})


def assert_close(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs), where
            return
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=RTOL, atol=RTOL * scale, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}[{n}]")
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_close(ours[key], theirs[key], f"{where}[{key}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(("name", "program"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_two_ranks_equal_one(stack: Stack, one_rank: dict[str, Any], name: str, program: programs.Program) -> None:
    from nnsight.modeling.transformers import TransformersModel

    remote = TransformersModel(models.repo_id(name), task=models.task(name))
    found = program(remote, name, {"remote": True})
    assert_close(found, program(one_rank[name], name, {}), f"{name}.{program.__name__}")


def test_a_model_that_cannot_be_split_is_refused_as_an_answer(stack: Stack) -> None:
    from nnsight.intervention.backends.remote import RemoteError
    from nnsight.modeling.transformers import TransformersModel

    remote = TransformersModel(models.repo_id("gpt2"), task="text-generation")
    with pytest.raises(RemoteError, match=r"'edif-test/gpt2' cannot be split over 2 ranks \(models.tensor_parallel\)"):
        programs.read(remote, "gpt2", {"remote": True})


def test_ranks_that_stray_fail_a_request_and_the_next_is_served(stack: Stack, one_rank: dict[str, Any]) -> None:
    from nnsight.intervention.backends.remote import RemoteError
    from nnsight.modeling.transformers import TransformersModel

    remote = TransformersModel(models.repo_id("llama"), task="text-generation")
    ended = pytest.raises(RemoteError, match="Rank 1 of the 2 that hold edif-test/llama ended with exit code 3")
    with ended, remote.trace(programs.PROMPT, remote=True):
        if os.environ["RANK"] == "1":
            os._exit(3)
        remote.lm_head.output.save()
    found = programs.read(remote, "llama", {"remote": True})
    assert_close(found, programs.read(one_rank["llama"], "llama", {}), "after a rank had ended")
