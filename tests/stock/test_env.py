"""What a request layers on the model: a PEFT adapter, an attention implementation. The next request has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

from tests.support import models
from tests.support.stack import Stack

from .support import PROMPT, backend, error_of, payload, post, tiny

ADAPTER = models.repo_id("gpt2-lora")


def logits(model: Any, **how: Any) -> torch.Tensor:
    with model.trace(PROMPT, **how):
        found = model.lm_head.output[0, -1].clone().save()
    return found  # noqa: RET504 - a save is read after the block


@pytest.fixture
def base(stack: Stack) -> torch.Tensor:
    torch.set_num_threads(1)
    return logits(tiny(dispatch=True))


def test_an_allowed_adapter_gives_what_it_gives_locally(stack: Stack, gpt2: Any, base: torch.Tensor) -> None:
    adapted = tiny(peft=ADAPTER)
    wanted = logits(tiny(peft=ADAPTER, dispatch=True))
    assert not torch.equal(wanted, base)
    for _ in range(2):  # the one after an adapter is the base again, and the adapter comes back
        assert torch.equal(logits(adapted, remote=True), wanted)
        assert torch.equal(logits(gpt2, remote=True), base)


def test_the_modules_of_an_adapter_can_be_read(stack: Stack) -> None:
    def read(model: Any, **how: Any) -> torch.Tensor:
        with model.trace(PROMPT, **how):
            found = model.transformer.h[1].attn.c_attn.lora_A.default.output.clone().save()
        return found  # noqa: RET504 - a save is read after the block

    found, wanted = read(tiny(peft=ADAPTER), remote=True), read(tiny(peft=ADAPTER, dispatch=True))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # the last digit differed once, on a crowded machine


@pytest.mark.parametrize("name", ["edif-test/another-lora", "/etc", "../gpt2-lora"])
def test_another_adapter_is_refused(stack: Stack, gpt2: Any, name: str) -> None:
    env = {"attn_implementation": "sdpa", "peft": name}
    sentence = error_of(post(stack, gpt2.to_model_key(), payload(gpt2), env=env))
    assert name in sentence
    assert "may not be used" in sentence


def test_an_adapter_is_no_model(stack: Stack, gpt2: Any) -> None:
    key = gpt2.to_model_key().replace(models.repo_id("gpt2"), ADAPTER)
    assert "adapter" in error_of(post(stack, key, payload(gpt2)))


def test_attention_changes_between_requests(stack: Stack) -> None:
    """Only eager attention hands out its weights; whoever asks for sdpa next gets none."""
    found = []
    asked = ["eager", "sdpa", "eager", "eager", "sdpa"]
    by_name = {name: tiny(attn_implementation=name) for name in ("eager", "sdpa")}
    for name in asked:
        with by_name[name].trace(PROMPT, remote=True):
            weights = by_name[name].transformer.h[0].attn.output[1]
            found.append("sdpa" if weights is None else "eager")
            found = list(found).save()
    assert found == asked


def test_a_client_that_names_no_attention_gets_the_models_own(stack: Stack, gpt2: Any) -> None:
    eager = tiny(attn_implementation="eager")
    assert torch.isfinite(logits(eager, remote=True)).all()
    chosen = backend(gpt2, env={})
    with gpt2.trace(PROMPT, backend=chosen):
        none = torch.tensor(gpt2.transformer.h[0].attn.output[1] is None).save()
    assert bool(none)


def test_a_refused_adapter_leaves_the_model_as_it_was(stack: Stack, gpt2: Any, base: torch.Tensor) -> None:
    with pytest.raises(RemoteError):
        logits_with(gpt2, "edif-test/another-lora")
    assert torch.equal(logits(gpt2, remote=True), base)


def logits_with(model: Any, adapter: str) -> None:
    chosen = backend(model, env={"attn_implementation": "sdpa", "peft": adapter})
    with model.trace(PROMPT, backend=chosen):
        found = model.lm_head.output.save()  # noqa: F841
