"""What the model host alone costs, without queue and gateway: `python -m tests.bench.host_bench [LEVEL...]`.

Latency of a run with waiting executors, next to the same block's own run time; runs per second; and a 140 MB result.
Prints a table; judges nothing.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.contract import HostSpec, Outcome, RunSpec, Verdict
from edif_hpc.worker.host_client import ModelHost
from tests.support import models
from tests.worker.service import PROMPT, Caught, scratch

RUNS, SECONDS = 60, 4.0
COUNT = iter(range(1_000_000))


def blocks(model: Any) -> dict[str, bytes]:
    small, large = Caught(), Caught()
    with model.trace(PROMPT, backend=small):
        logits = model.lm_head.output.save()  # noqa: F841
    with model.trace(PROMPT, backend=large):
        import torch

        out = model.lm_head.output  # noqa: F841
        result = torch.randn(35_000_000).save()  # noqa: F841
    return {"small": small.blob, "large": large.blob}


async def one(host: ModelHost, blob: bytes) -> Outcome:
    spec = RunSpec(f"bench-{next(COUNT)}:1", True, {})
    outcome = await host.run(spec, blob, lambda line: None, lambda: None)
    if outcome.verdict is not Verdict.COMPLETED or outcome.result is None:
        raise SystemExit(outcome.description)
    outcome.result.close()
    return outcome


async def latency(host: ModelHost, blob: bytes) -> tuple[float, float, float]:
    """Milliseconds: p50, p95, and p50 of what is not the run itself."""
    walls, overheads = [], []
    for _ in range(RUNS):
        began = time.perf_counter()
        outcome = await one(host, blob)
        walls.append(1e3 * (time.perf_counter() - began))
        overheads.append(walls[-1] - 1e3 * outcome.meta["runtime"])
        await asyncio.sleep(0.02)  # a client takes its time too
    return statistics.median(walls), sorted(walls)[int(0.95 * RUNS)], statistics.median(overheads)


async def per_second(ask: Callable[[], Awaitable[Any]], clients: int) -> float:
    done, until = 0, time.perf_counter() + SECONDS

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < until:
            await ask()
            done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / SECONDS


async def measure(level: Isolation, hub: Path, key: str, blobs: dict[str, bytes]) -> None:
    spec = HostSpec(key, hub, scratch(), isolation=level, required=level)
    began = time.perf_counter()
    host = await ModelHost.start(spec, lambda text: None)
    ready = time.perf_counter() - began
    await asyncio.sleep(0.5)
    p50, p95, overhead = await latency(host, blobs["small"])
    rates = [await per_second(lambda: one(host, blobs["small"]), clients) for clients in (1, 8, 32)]
    began = time.perf_counter()
    await one(host, blobs["large"])
    large = time.perf_counter() - began
    await host.close()
    shutil.rmtree(spec.scratch)
    print(
        f"{level:8} ready {ready:5.1f} s | p50 {p50:6.1f} p95 {p95:6.1f} ms, beside the run {overhead:5.2f} ms | "
        f"per second with 1, 8, 32: {rates[0]:5.0f} {rates[1]:5.0f} {rates[2]:5.0f} | 140 MB {large:5.2f} s"
    )


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="edif-bench-"))
    root.chmod(0o755)
    hub = models.build_cache(root, ["gpt2"])
    models.offline_client(hub)
    from nnsight import TransformersModel

    model = TransformersModel(models.repo_id("gpt2"), task="text-generation")
    blobs = blocks(model)
    for level in [Isolation(name) for name in sys.argv[1:]] or list(Isolation):
        asyncio.run(measure(level, hub, model.to_model_key(), blobs))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
