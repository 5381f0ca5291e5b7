"""What a large result costs over a thin line: `python -m tests.bench.downloads`, a part of `make bench`.

All hidden states of SmolLM2 on 32 prompts of 128 tokens, by the stock client and by ours, with and without a cut in the
middle of the download; beside them torch.save of the same values and one zstd-3 frame, which is what a person would
send by hand. A stock client that was cut off has nothing but an error: its second request, which then has all again, is
counted to it.
"""

from __future__ import annotations

import io
import sys
import time
from functools import partial
from typing import Any

import httpx
import torch
import zstandard
from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from tests.support.proxy import Proxy
from tests.support.stack import Stack

from . import line
from .line import LINE_BYTES, Measured, measured, smollm2

ROUNDS = 3
PROMPTS, TOKENS = 32, 128
RANGES = 6
"""That our client reads at once: each is cut."""


def hidden_states(model: TransformersModel, tokens: torch.Tensor, **how: Any) -> Any:
    """Every layer's output, and the embeddings before the first."""
    states = None
    with model.trace(tokens, **how):
        states = [model.model.embed_tokens.output, *(layer.output for layer in model.model.layers)].save()
    return states  # noqa: RET504 - the block's variable is filled after the block


def stock(model: TransformersModel, tokens: torch.Tensor) -> None:
    hidden_states(model, tokens, remote=True)


def stock_cut(model: TransformersModel, tokens: torch.Tensor, proxy: Proxy, at: int) -> None:
    """The download is cut, so what was asked for is asked for again."""
    proxy.cut_after(at)
    try:
        stock(model, tokens)
    except (httpx.HTTPError, OSError, RuntimeError):
        stock(model, tokens)
        return
    raise AssertionError("the stock client did not notice that its download was cut")


def ours(model: TransformersModel, tokens: torch.Tensor) -> None:
    handle = edif_hpc.submit(progress=False)
    hidden_states(model, tokens, backend=handle)
    handle.result()


def ours_cut(model: TransformersModel, tokens: torch.Tensor, proxy: Proxy, at: int) -> None:
    handle = edif_hpc.submit(progress=False)
    hidden_states(model, tokens, backend=handle)
    handle.wait()
    proxy.cut_after(*[at] * RANGES)
    handle.result()
    proxy.cut_no_more()  # parts are shared out among the connections as they come: not each gets that far


def by_hand(values: Any) -> tuple[int, int, float]:
    """Bytes of torch.save, bytes of one zstd-3 frame of it, and the seconds that compressing takes."""
    plain = io.BytesIO()
    torch.save(values, plain)
    began = time.monotonic()
    packed = zstandard.ZstdCompressor(level=3).compress(plain.getbuffer())
    return plain.getbuffer().nbytes, len(packed), time.monotonic() - began


def measure(stack: Stack, proxy: Proxy, say: line.Say) -> dict[str, list[Measured]]:
    model = smollm2()
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Measured]] = {}
    for number in range(ROUNDS):
        tokens = torch.randint(1000, 40_000, (PROMPTS, TOKENS), generator=generator)
        edif_hpc.connect(stack.url, stack.key, stock=True, progress=False)
        say(f"round {number + 1} of {ROUNDS}")
        whole = measured(proxy, partial(stock, model, tokens))
        half = whole[1] // 2
        found.setdefault("stock client", []).append(whole)
        for name, step in {
            "our client": partial(ours, model, tokens),
            "stock client, cut": partial(stock_cut, model, tokens, proxy, half),
            "our client, cut": partial(ours_cut, model, tokens, proxy, half // RANGES),
        }.items():
            say(f"round {number + 1} of {ROUNDS}: {name}")
            found.setdefault(name, []).append(measured(proxy, step))
    edif_hpc.disconnect()
    # The same values without a service, and so without what their run takes.
    size, packed, seconds = by_hand(hidden_states(smollm2(dispatch=True), tokens))
    found["torch.save"] = [(size / LINE_BYTES, size)]
    found["torch.save, zstd-3"] = [(seconds + packed / LINE_BYTES, packed)]
    return found


def main() -> int:
    say = line.teller()
    with line.at_the_end_of_a_line(say) as (stack, proxy):
        found = measure(stack, proxy, say)
    line.tell("downloads", f"hidden states of SmolLM2, {PROMPTS} x {TOKENS} tokens", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
