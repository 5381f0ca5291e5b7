"""Payloads and results on both sides of the inline limit, compressed or not, however the client waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteError

from tests.support.stack import Stack

from .support import PROMPT, Watched, backend, compressing, error_of, result_of, works

SMALL, LARGE = 100_000, 700_000
"""float32 numbers that do not compress: 0.4 MB and 2.8 MB, with the limit at 1 MiB."""

sizes = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
compressed = pytest.mark.parametrize("compress", [True, False], ids=["zstd", "plain"])


def noise(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(7))


@sizes
@compressed
def test_blocking_result(stack: Stack, gpt2: Any, size: int, compress: bool) -> None:
    with compressing(compress):
        watched = backend(gpt2, Watched)
        with gpt2.trace(PROMPT, backend=watched):
            found = noise(size).save()
    assert torch.equal(found, noise(size))
    assert watched.came is (bytes if size == SMALL else str)


@sizes
@compressed
def test_polled_result(stack: Stack, gpt2: Any, size: int, compress: bool) -> None:
    with compressing(compress):
        polled = backend(gpt2, Watched, blocking=False)
        with gpt2.trace(PROMPT, backend=polled):
            found = noise(size).save()  # noqa: F841
        assert torch.equal(result_of(polled)["found"], noise(size))
    assert polled.came is str  # a poll never carries bytes


@sizes
def test_awaited_result(stack: Stack, gpt2: Any, size: int) -> None:
    async def main() -> Any:
        awaited = backend(gpt2, AsyncRemoteBackend)
        with gpt2.trace(PROMPT, backend=awaited):
            found = noise(size).save()  # noqa: F841
        return await awaited

    assert torch.equal(asyncio.run(main())["found"], noise(size))


@sizes
@compressed
def test_payload(stack: Stack, gpt2: Any, size: int, compress: bool) -> None:
    """What the block closes over travels with it; above the limit it goes through the store."""
    brought = noise(size)
    with compressing(compress), gpt2.trace(PROMPT, remote=True):
        total = brought.double().sum().save()
    assert torch.equal(total, noise(size).double().sum())


def test_a_saved_view_does_not_drag_its_storage_along(stack: Stack, gpt2: Any) -> None:
    with compressing(False):
        watched = backend(gpt2, Watched)
        with gpt2.trace(PROMPT, backend=watched):
            few = noise(5 * LARGE)[:10].save()
    assert watched.came is bytes
    assert torch.equal(few, noise(5 * LARGE)[:10])


def test_a_result_beyond_the_limit_is_refused(stack: Stack, gpt2: Any) -> None:
    """result_bytes is 32 MiB here."""
    polled = backend(gpt2, blocking=False)
    with gpt2.trace(PROMPT, backend=polled):
        found = noise(12_000_000).save()  # noqa: F841
    assert "larger than" in (sentence := error_of(polled)) or "more than the limit of 32 MiB" in sentence
    works(gpt2)


def test_a_payload_beyond_the_limit_is_refused(stack: Stack, gpt2: Any) -> None:
    """payload_bytes is 16 MiB here."""
    brought = noise(5_000_000)
    with pytest.raises(RemoteError, match=r"larger than 16777216 bytes"), gpt2.trace(PROMPT, remote=True):
        total = brought.sum().save()  # noqa: F841
    works(gpt2)
