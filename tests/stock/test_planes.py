"""Results in the format planes, asked for over plain HTTP: equal tensors, fewer bytes, parts that can be checked.

And beside them a stock client, which is to notice none of it.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import zstandard
from nnsight.intervention.backends.remote import RemoteBackend

from edif_hpc.core import planes
from tests.support.servers import eventually
from tests.support.stack import Stack

from .support import ANSWER_SECONDS, PROMPT, Keep, backend, compressing, result_of

MIB = 1024 * 1024
SMALL, LARGE = 100_000, 7_000_000
"""bf16 numbers: 0.2 MB, which rides in Redis, and 14 MB, of which planes make two parts."""

sizes = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])


def numbers(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).bfloat16()


def kept(gpt2: Any, size: int) -> RemoteBackend:
    """A block whose saved values have views and aliases among them."""
    keep = backend(gpt2, Keep)
    with gpt2.trace(PROMPT, backend=keep):
        logits = gpt2.lm_head.output[0, -1].clone().save()  # noqa: F841
        whole = torch.randn(size, generator=torch.Generator().manual_seed(7)).bfloat16().save()
        again = whole.view(-1, 100).save()  # noqa: F841
        row = torch.zeros(1000, 1000)[7].save()  # noqa: F841
    return keep


def summary_of(stack: Stack, gpt2: Any, blob: bytes, compress: bool, **headers: str) -> dict[str, Any]:
    """Send a block as a client of our own would, and wait for its end."""
    envelope = {"model_key": gpt2.to_model_key(), "compress": compress, "env": {}}
    sent = httpx.post(
        f"{stack.url}/request",
        data={"data": json.dumps(envelope)},
        files={"blob": ("request", blob, "application/octet-stream")},
        headers={"ndif-api-key": stack.key, "nnsight-version": "0.8.1", **headers},
        timeout=30,
    )
    url = f"{stack.url}/api/requests/{sent.raise_for_status().json()['id']}"

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = (
            httpx.get(url, headers={"ndif-api-key": stack.key}, timeout=30).raise_for_status().json()
        )
        assert found["status"] != "ERROR", found["description"]
        return found if found["status"] == "COMPLETED" else None

    return eventually(ended, ANSWER_SECONDS, f"the end of {url}")


def checked(summary: dict[str, Any]) -> bytes:
    """Download by parts, each of which has to be what the worker sent."""
    transfer, parts = summary["transfer"], []
    for number, digest in enumerate(transfer["digests"]):
        start = number * transfer["part_bytes"]
        end = min(start + transfer["part_bytes"], transfer["bytes"])
        answer = httpx.get(summary["result"], headers={"range": f"bytes={start}-{end - 1}"}, timeout=60)
        parts.append(answer.raise_for_status().content)
        assert hashlib.sha256(parts[-1]).hexdigest() == digest
    data = b"".join(parts)
    assert len(data) == transfer["bytes"] == summary["result_bytes"]
    return data


@sizes
@pytest.mark.parametrize("compress", [True, False], ids=["payload-zstd", "payload-plain"])
def test_planes_hold_the_tensors_that_a_stock_client_gets(
    stack: Stack, gpt2: Any, size: int, compress: bool, tmp_path: Path
) -> None:
    with compressing(compress):
        blob = kept(gpt2, size).blob
        stock = backend(gpt2, blocking=False)
        with gpt2.trace(PROMPT, backend=stock):
            logits = gpt2.lm_head.output[0, -1].clone().save()
        logits = result_of(stock)["logits"]
    summary = summary_of(stack, gpt2, blob, compress, **{"edif-result-format": "planes"})
    data = checked(summary)
    assert (summary["transfer"]["format"], summary["transfer"]["part_bytes"]) == ("planes", 8 * MIB)
    assert len(summary["transfer"]["digests"]) == (1 if size == SMALL else 2)
    assert data.startswith(planes.MAGIC)
    assert len(data) < 0.85 * 2 * size

    (tmp_path / "coded").write_bytes(data)
    planes.decode_file(tmp_path / "coded", tmp_path / "result.pt", threads=2, limit=64 * MIB)
    saved = torch.load(tmp_path / "result.pt", mmap=True, weights_only=False)
    assert set(saved) == {"logits", "whole", "again", "row"}
    assert torch.equal(saved["whole"], numbers(size))
    assert saved["whole"].dtype is torch.bfloat16
    assert saved["again"].data_ptr() == saved["whole"].data_ptr()
    assert saved["row"].untyped_storage().nbytes() == 4000
    assert torch.equal(saved["logits"], logits)
    assert (tmp_path / "result.pt").stat().st_size < 2 * size + 10_000


def test_the_command_line_unpacks_what_our_own_client_asked_for(stack: Stack, gpt2: Any) -> None:
    summary = summary_of(stack, gpt2, kept(gpt2, SMALL).blob, True, **{"edif-result-format": "planes"})
    file = stack.home / "saved.pt"
    stack.cli("result", summary["id"], "--out", str(file))
    assert torch.equal(torch.load(file, weights_only=False)["whole"], numbers(SMALL))
    assert [path.name for path in stack.home.iterdir() if "saved" in path.name] == ["saved.pt"]
    file.unlink()


@sizes
@pytest.mark.parametrize("compress", [True, False], ids=["zstd", "plain"])
def test_without_the_header_a_result_is_what_it_always_was(stack: Stack, gpt2: Any, size: int, compress: bool) -> None:
    with compressing(compress):
        blob = kept(gpt2, size).blob
    summary = summary_of(stack, gpt2, blob, compress)
    data = checked(summary)
    assert summary["transfer"]["format"] == ("zstd" if compress else "plain")
    plain = zstandard.ZstdDecompressor().decompress(data) if compress else data
    saved = torch.load(io.BytesIO(plain), weights_only=False)
    assert torch.equal(saved["whole"], numbers(size))
    assert saved["again"].data_ptr() == saved["whole"].data_ptr()
    assert len(plain) < 2 * size + 10_000


def test_a_format_that_there_is_not_is_refused(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refusal:
        summary_of(stack, gpt2, b"x", True, **{"edif-result-format": "lossy"})
    assert refusal.value.response.status_code == 422
    assert "'lossy'" in refusal.value.response.json()["detail"]
