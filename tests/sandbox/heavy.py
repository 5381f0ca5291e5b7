"""Honest work with torch and nnsight, tried under the sandbox. Imported by the runner alone: it costs seconds."""

from __future__ import annotations

import os
from typing import Any

import nnsight  # noqa: F401
import torch

from tests.sandbox.attempts import READONLY_FILE, WORKS, Attempt, Ground

TABLE: dict[str, Attempt] = {}
MODEL: dict[str, Any] = {}


def prepare(hub: str) -> None:
    """Load the tiny GPT-2 once, in the process that is forked. One thread: a forked child hangs otherwise."""
    from nnsight.modeling.transformers import TransformersModel

    from tests.support import models

    torch.set_num_threads(1)
    MODEL["gpt2"] = TransformersModel(models.repo_id("gpt2"), task=models.task("gpt2"), dispatch=True)
    MODEL["gpt2"]._module.requires_grad_(False)


def _honest(function: Any) -> Any:
    TABLE[function.__name__] = Attempt(function, WORKS, WORKS)
    return function


@_honest
def multiply_with_several_threads(g: Ground) -> object:
    torch.set_num_threads(2)
    a = torch.randn(600, 600)
    assert torch.isfinite(a @ a).all()
    assert torch.get_num_threads() == 2
    return None


@_honest
def differentiate(g: Ground) -> object:
    x = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.gelu(x @ x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    return None


@_honest
def save_to_a_kept_descriptor(g: Ground) -> object:
    # The read-only file stands for the position of a kept descriptor; a pipe takes the bytes.
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        torch.save({"x": torch.arange(10)}, file)
    with os.fdopen(reader, "rb") as file:
        assert file.read()
    assert os.fstat(READONLY_FILE).st_size
    return None


@_honest
def trace_a_model(g: Ground) -> object:
    model = MODEL["gpt2"]
    with model.trace(input_ids=torch.tensor([[1, 2, 3]])):
        hidden = model.transformer.h[1].output[0].save()
        logits = model.lm_head.output.save()
    assert logits.shape[:2] == (1, 3)
    assert hidden.isfinite().all()
    return None


@_honest
def trace_gradients(g: Ground) -> object:
    model = MODEL["gpt2"]
    with model.trace(input_ids=torch.tensor([[1, 2, 3]])):
        x = model.transformer.wte.output
        x.requires_grad_(True)
        with model.lm_head.output.sum().backward():
            grad = x.grad.save()
    assert grad.shape[-1] == 64
    return None


@_honest
def generate(g: Ground) -> object:
    model = MODEL["gpt2"]
    with model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=3) as tracer:
        out = tracer.result.save()
    assert out.shape == (1, 6)
    return None


@_honest
def numpy_and_sampling(g: Ground) -> object:
    import numpy

    assert torch.multinomial(torch.ones(10), 3).shape == (3,)
    assert numpy.linalg.svd(numpy.eye(20))[1].sum() == 20
    assert torch.from_numpy(numpy.random.default_rng().random(3)).shape == (3,)
    return None
