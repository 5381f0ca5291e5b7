"""A block that fails tells its user what they would have seen locally, what it cost, and nothing of how we run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nnsight.intervention.backends.remote import RemoteError

from tests.support.stack import Stack

from .support import PROMPT, works


def line_of(source: str) -> int:
    """Where a line of this file is; its first occurrence."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip() == source)


def helper(value: Any) -> Any:
    return value.no_such_method()


def assert_only_the_users(text: str) -> None:
    assert text.startswith("Traceback (most recent call last):")
    assert "site-packages/nnsight" not in text
    assert "edif_hpc/worker" not in text


def test_traceback_names_file_line_and_source(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(RemoteError) as caught, gpt2.trace(PROMPT, remote=True) as tracer:  # noqa: PT012
        hidden = gpt2.transformer.h[0].output  # noqa: F841
        raise ValueError(42)
    text = str(caught.value)
    assert_only_the_users(text)
    source = "raise ValueError(42)"
    assert f'File "{__file__}", line {line_of(source)}' in text
    assert source in text
    assert text.endswith("ValueError: 42")
    assert tracer.backend.meta["runtime"] > 0
    assert tracer.backend.meta["max_memory_usage"] > 0


def test_traceback_goes_through_a_helper(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(RemoteError) as caught, gpt2.trace(PROMPT, remote=True):
        helper(gpt2.lm_head.output)
    text = str(caught.value)
    assert_only_the_users(text)
    assert f"line {line_of('helper(gpt2.lm_head.output)')}" in text
    assert "in helper" in text
    assert "no_such_method" in text.splitlines()[-1]


def test_an_error_inside_the_model_is_the_users_too(stack: Stack, gpt2: Any) -> None:
    """A tensor of a wrong shape fails later, in a module that only the service runs."""
    with pytest.raises(RemoteError) as caught, gpt2.trace(PROMPT, remote=True):  # noqa: PT012
        gpt2.transformer.h[0].output = gpt2.transformer.wte.output[:, :, :7]
        logits = gpt2.lm_head.output.save()  # noqa: F841
    text = str(caught.value)
    assert "RuntimeError" in text
    assert "edif_hpc/worker" not in text


def test_an_unknown_module_fails_here(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(RemoteError, match="no_such_layer"), gpt2.trace(PROMPT, remote=True):
        logits = gpt2.no_such_layer.output.save()  # noqa: F841


def test_meta_on_completed(stack: Stack, gpt2: Any) -> None:
    with gpt2.trace(PROMPT, remote=True) as tracer:
        logits = gpt2.lm_head.output.save()
    meta = tracer.backend.meta
    assert logits.shape[-1] == 512
    assert 0 < meta["runtime"] < 60
    assert meta["max_memory_usage"] > 1_000_000
    assert meta["max_mem_by_gpu"] == {}
    assert meta["max_mem_pct_by_gpu"] == {}
    assert meta["isolation"] == stack.level


def test_a_value_that_cannot_be_sent_back_is_named(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(RemoteError, match="'stuck' cannot be sent back"), gpt2.trace(PROMPT, remote=True):
        stuck = (n for n in range(3)).save()  # noqa: F841
    works(gpt2)


def test_exit_in_a_block_is_an_error_of_its_user(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(RemoteError, match="SystemExit"), gpt2.trace(PROMPT, remote=True):
        raise SystemExit(3)
    works(gpt2)
