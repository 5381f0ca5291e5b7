"""What a large result costs over a thin line: `python -m tests.bench.downloads`, a part of `make bench`.

All hidden states of SmolLM2 on 32 prompts of 128 tokens, at 100 Mbit/s through the tests' proxy, by the stock client
and by ours, with and without a cut in the middle of the download; beside them torch.save of the same values and one
zstd-3 frame, which is what a person would send by hand. Seconds are from the request to values in memory. A stock
client that was cut off has nothing but an error: its second request, which then has all again, is counted to it.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
import zstandard
from nnsight.modeling.transformers import TransformersModel
from rich.console import Console
from rich.table import Table

import edif_hpc
from edif_hpc.fleet.demo_model import REPO_ID
from tests.support import models
from tests.support.proxy import Proxy, proxied
from tests.support.stack import Stack, client_of, running

from . import report
from .run import RESULTS

ROUNDS = 3
PROMPTS, TOKENS = 32, 128
LINE_BYTES = 12_500_000.0
"""100 Mbit/s."""
RANGES = 6
"""That our client reads at once: each is cut."""
Measured = tuple[float, int]
"""Seconds, and bytes that came over the line."""


def hidden_states(model: TransformersModel, tokens: torch.Tensor, **how: Any) -> Any:
    """Every layer's output, and the embeddings before the first."""
    states = None
    with model.trace(tokens, **how):
        states = [model.model.embed_tokens.output, *(layer.output for layer in model.model.layers)].save()
    return states  # noqa: RET504 - the block's variable is filled after the block


def measured(proxy: Proxy, work: Callable[[], Any]) -> Measured:
    before, began = proxy.counters.down_bytes, time.monotonic()
    work()
    return time.monotonic() - began, proxy.counters.down_bytes - before


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


def measure(stack: Stack, say: Callable[[str], None]) -> dict[str, list[Measured]]:
    model = TransformersModel(REPO_ID, task="text-generation")
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Measured]] = {}
    with proxied(stack.url, bytes_per_second=LINE_BYTES) as proxy:
        seen = Stack(stack.home, proxy.url, stack.key)
        with client_of(seen):
            for number in range(ROUNDS):
                tokens = torch.randint(1000, 40_000, (PROMPTS, TOKENS), generator=generator)
                edif_hpc.connect(proxy.url, stack.key, stock=True, progress=False)
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
        size, packed, seconds = by_hand(_local(tokens))
    found["torch.save"] = [(size / LINE_BYTES, size)]
    found["torch.save, zstd-3"] = [(seconds + packed / LINE_BYTES, packed)]
    return found


def _local(tokens: torch.Tensor) -> Any:
    """The same values without a service, and so without what their run takes."""
    return hidden_states(TransformersModel(REPO_ID, task="text-generation", dispatch=True), tokens)


def print_table(found: dict[str, list[Measured]]) -> None:
    title = f"hidden states of SmolLM2, {PROMPTS} x {TOKENS} tokens, at 100 Mbit/s"
    table = Table(title=title, header_style="bold")
    for column in ("", "MB over the line", "seconds, median", "least", "most"):
        table.add_column(column, justify="left" if not column else "right")
    for name, samples in found.items():
        seconds = [each[0] for each in samples]
        size = statistics.median(each[1] for each in samples) / 1e6
        table.add_row(name, f"{size:.1f}", *(f"{value:.1f}" for value in (
            statistics.median(seconds), min(seconds), max(seconds))))  # fmt: skip
    Console().print(table)


def main() -> int:
    console = Console(stderr=True)
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False)

    os.umask(0o022)  # the service may run as another user
    with tempfile.TemporaryDirectory(prefix="edif-hpc-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        say("the model")
        hub = models.build_cache(folder, ["gpt2"])
        models.smollm2(folder)
        for path in (hub, *hub.rglob("*")):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
        models.offline_client(hub)
        torch.set_num_threads(1)
        with running(folder / "home", hub, "none") as stack:
            say("the first request, which loads the model")
            with client_of(stack):
                hidden_states(TransformersModel(REPO_ID, task="text-generation"), torch.ones(1, 8, dtype=torch.long),
                              remote=True)  # fmt: skip
            found = measure(stack, say)
    print_table(found)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"downloads-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": report.machine(), "samples": found}, indent=1) + "\n")
    print(f"Written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
