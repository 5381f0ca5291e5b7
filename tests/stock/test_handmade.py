"""Bodies that no stock client sends: one sentence for each, and the next request is served as if nothing had been."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import zstandard

from tests.support.stack import Stack

from .support import compressing, error_of, payload, post, result_of, tiny, works


def test_by_hand_is_understood_at_all(stack: Stack, gpt2: Any) -> None:
    assert float(result_of(post(stack, gpt2.to_model_key(), payload(gpt2)))["answer"]) == 1


def test_unknown_persistent_id(stack: Stack, gpt2: Any) -> None:
    """A block made for Llama names modules that GPT-2 has not."""
    sentence = error_of(post(stack, gpt2.to_model_key(), payload(tiny("llama"))))
    assert "which the served model does not have" in sentence
    assert "transformers version" in sentence
    works(gpt2)


@pytest.mark.parametrize("compress", [True, False], ids=["zstd", "plain"])
def test_truncated_blob(stack: Stack, gpt2: Any, compress: bool) -> None:
    with compressing(compress):
        blob = payload(gpt2)
        sentence = error_of(post(stack, gpt2.to_model_key(), blob[: len(blob) // 2]))
    assert "payload" in sentence
    assert "send it again" in sentence
    assert "Traceback" not in sentence
    works(gpt2)


@pytest.mark.parametrize("compress", [True, False], ids=["zstd", "plain"])
def test_noise(stack: Stack, gpt2: Any, compress: bool) -> None:
    with compressing(compress):
        sentence = error_of(post(stack, gpt2.to_model_key(), b"\x00 this is no block \xff" * 20))
    assert "send it again" in sentence
    assert "Traceback" not in sentence
    works(gpt2)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "silent"])
def test_zstd_bomb(stack: Stack, gpt2: Any, announced: bool) -> None:
    """Two gigabytes of nothing in some 100 kB; the limit is 16 MiB here."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=announced).compressobj(
        size=2_000_000_000 if announced else -1
    )
    chunk = bytes(10_000_000)
    bomb = b"".join([compressor.compress(chunk) for _ in range(200)] + [compressor.flush()])
    assert len(bomb) < 1_000_000
    sentence = error_of(post(stack, gpt2.to_model_key(), bomb))
    assert "larger than the limit of 16 MiB when unpacked" in sentence
    works(gpt2)


def test_a_class_that_is_not_served(stack: Stack, gpt2: Any) -> None:
    key = gpt2.to_model_key().replace("nnsight.modeling.transformers.TransformersModel", "os.system")
    with pytest.raises(httpx.HTTPStatusError) as caught:
        post(stack, key, b"x")
    assert caught.value.response.status_code == 400
    assert "os.system" in caught.value.response.json()["detail"]


def test_a_malformed_envelope(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        post(stack, gpt2.to_model_key(), b"x", env="not a mapping")
    assert caught.value.response.status_code == 422
    assert "env" in caught.value.response.json()["detail"]


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"attn_implementation": "no_such_attention"}, "no_such_attention"),
        ({"attn_implementation": "kernels-community/anything"}, "kernels-community/anything"),
        ({"attn_implementation": 3}, "attn_implementation"),
        ({"device_map": "auto"}, "device_map"),
    ],
)
def test_an_env_that_cannot_be(stack: Stack, gpt2: Any, env: dict[str, Any], named: str) -> None:
    sentence = error_of(post(stack, gpt2.to_model_key(), payload(gpt2), env=env))
    assert named in sentence
    assert "Traceback" not in sentence
    works(gpt2)
