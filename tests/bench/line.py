"""What the benchmarks over a thin line have in common: SmolLM2 behind a proxy of 100 Mbit/s, a table, a JSON file.

Seconds are from the request to values in memory, bytes are those that came over the line.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from rich.console import Console
from rich.table import Table

from edif_hpc.fleet.demo_model import REPO_ID
from tests.support import models
from tests.support.proxy import Proxy, proxied
from tests.support.stack import Stack, client_of, running

from . import report
from .run import RESULTS

LINE_BYTES = 12_500_000.0
"""100 Mbit/s."""
Measured = tuple[float, int]
"""Seconds, and bytes that came over the line."""
Say = Callable[[str], None]


def teller() -> Say:
    """Says on stderr how far a benchmark is."""
    console, began = Console(stderr=True), time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False)

    return say


def smollm2(**how: Any) -> TransformersModel:
    """Its shape; with `dispatch=True` its weights too."""
    return TransformersModel(REPO_ID, task="text-generation", **how)


@contextmanager
def at_the_end_of_a_line(say: Say) -> Iterator[tuple[Stack, Proxy]]:
    """A service that holds SmolLM2, seen through the line, and the stock client pointed at it."""
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
            model = smollm2()
            with client_of(stack), model.trace(torch.ones(1, 8, dtype=torch.long), remote=True):
                model.lm_head.output[0, -1, 0].save()
            with proxied(stack.url, bytes_per_second=LINE_BYTES) as proxy:
                seen = Stack(stack.home, proxy.url, stack.key)
                with client_of(seen):
                    yield seen, proxy


def measured(proxy: Proxy, work: Callable[[], Any]) -> Measured:
    before, began = proxy.counters.down_bytes, time.monotonic()
    work()
    return time.monotonic() - began, proxy.counters.down_bytes - before


def tell(name: str, title: str, found: dict[str, list[Measured]]) -> None:
    """Print the table, and keep the samples."""
    table = Table(title=f"{title}, at 100 Mbit/s", header_style="bold")
    for column in ("", "MB over the line", "seconds, median", "least", "most"):
        table.add_column(column, justify="left" if not column else "right")
    for row, samples in found.items():
        seconds = [each[0] for each in samples]
        size = statistics.median(each[1] for each in samples) / 1e6
        table.add_row(row, f"{size:.1f}", *(f"{value:.1f}" for value in (
            statistics.median(seconds), min(seconds), max(seconds))))  # fmt: skip
    Console().print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": report.machine(), "samples": found}, indent=1) + "\n")
    print(f"Written to {path}")
