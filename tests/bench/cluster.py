"""What a cluster adds: `python -m tests.bench.cluster`, the second half of `make bench`, on a real Slurm of two nodes.

A cold pool stands beside a bare `apptainer exec` that loads the same model from the same image, in turn. Handovers are
those of two-minute allocations, the shortest there may be, under a request a second for each of two pools.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel
from rich.console import Console
from rich.table import Table

from edif_hpc.fleet.demo_model import REPO_ID
from tests.cluster import apptainer, bed
from tests.cluster import site as sites
from tests.cluster.site import Site
from tests.cluster.stream import DRAINING, PROMPT, READY, reached, stream_of, words
from tests.support import models
from tests.support.slurm import Cluster
from tests.support.stack import Stack, client_of

from . import report
from .run import RESULTS

ROUNDS = 3
GENERATIONS = 3
COLD = f"""[[pool]]
name = "main"
image = "{{image}}"
cpus = 2
time = "00:20:00"
idle_seconds = 3
models = ["{REPO_ID}"]
"""
OTHER = models.repo_id("llama")
HANDOVERS = f"""[[pool]]
name = "over"
image = "{{image}}"
cpus = 1
time = "00:02:00"
models = ["{REPO_ID}"]

[[pool]]
name = "after"
image = "{{image}}"
cpus = 1
time = "00:02:00"
handover = "requeue"
models = ["{OTHER}"]
"""
LOAD = (
    "from nnsight.modeling.transformers import TransformersModel as M; "
    f"M({REPO_ID!r}, task='text-generation', dispatch=True)"
)
HANDOVER_SECONDS = 600.0
EMPTY_SECONDS = 120.0

Samples = dict[str, list[float]]
Say = Callable[[str], None]


def bare_load(cluster: Cluster, image: Path, cache: Path) -> float:
    """Seconds that the image takes to load the model when nothing else is asked of it."""
    command = [
        "apptainer", "exec", "--containall", "--cleanenv", "--bind", f"{cache}:{cache}:ro",
        f"--env=HF_HUB_CACHE={cache}", "--env=HF_HUB_OFFLINE=1", "--env=OMP_NUM_THREADS=1", image,
        "python3", "-c", LOAD,
    ]  # fmt: skip
    began = time.monotonic()
    cluster.run(command, timeout=300.0)
    return time.monotonic() - began


def first_result(model: TransformersModel) -> float:
    """Seconds from a request to its result."""
    began = time.monotonic()
    with model.trace(PROMPT, remote=True):
        model.output.logits.save()
    return time.monotonic() - began


def cold_pool(cluster: Cluster, image: Path, cache: Path, say: Say) -> Samples:
    """Each round begins with an empty queue."""
    found: Samples = {"bare load": [], "cold pool": []}
    with sites.running(cluster, cache, COLD.format(image=image)) as site, client_of(_stack(site)):
        model = TransformersModel(REPO_ID, task="text-generation")
        for number in range(ROUNDS):
            say(f"round {number + 1} of {ROUNDS}: a bare load, then a request to a pool without a worker")
            found["bare load"].append(bare_load(cluster, image, cache))
            found["cold pool"].append(first_result(model))
            cluster.wait(lambda: cluster.jobs() == [], EMPTY_SECONDS, "an idle pool's end")
    return found


def handovers(cluster: Cluster, image: Path, cache: Path, say: Say) -> Samples:
    """Seconds without a ready worker at each handover, by mode, and commands given to Slurm meanwhile."""
    with sites.running(cluster, cache, HANDOVERS.format(image=image)) as site, client_of(_stack(site)):
        stream = stream_of(site, {"over": REPO_ID, "after": OTHER})
        began = time.monotonic()
        for pool in stream.models:
            for generation in range(2, GENERATIONS + 1):
                say(f"handover to generation {generation} of the pool {pool}")
                stream.until(reached(site, pool, READY, generation), HANDOVER_SECONDS, "a handover")
        stream.until(lambda: all(len(_gaps(site, pool)) >= GENERATIONS - 1 for pool in stream.models), 120.0, "its end")
        hours = (time.monotonic() - began) / 3600
        stream.finish()
        found = {f"gap, {mode}": _gaps(site, pool) for pool, mode in (("over", "overlap"), ("after", "requeue"))}
        given = site.json("status")["slurm_commands"]["total"]
        return {**found, **{f"{command} an hour": [number / hours] for command, number in given.items()}}


def _gaps(site: Site, pool: str) -> list[float]:
    """From a predecessor's last claim to its successor's first, where the latter came later."""
    ready = {word.generation: _seconds(word.at) for word in reversed(words(site, pool, READY))}
    drained = {word.generation: _seconds(word.at) for word in words(site, pool, DRAINING)}
    return [max(0.0, ready[number + 1] - at) for number, at in sorted(drained.items()) if number + 1 in ready]


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _stack(site: Site) -> Stack:
    return Stack(site.home, site.url, site.key)


def print_table(samples: Samples) -> None:
    table = Table(title="edif_hpc on Slurm", header_style="bold")
    for column in ("", "median", "least", "most", "n"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in samples.items():
        table.add_row(name, *(f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))),
                      str(len(values)))  # fmt: skip
    ratio = statistics.median(samples["cold pool"]) / statistics.median(samples["bare load"])
    table.add_row("cold pool beside a bare load", f"{ratio:.2f} x", "", "", "")
    Console().print(table)


def write_json(samples: Samples) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"cluster-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": report.machine(), "samples": samples}, indent=1) + "\n")
    return path


def main() -> int:
    console = Console(stderr=True)
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False)

    obstacle = bed.obstacle() or apptainer.obstacle()
    if obstacle:
        print(f"Not measured on Slurm: {obstacle}")
        return 0
    os.umask(0o022)  # what is made for the ordinary user must be readable to it
    try:
        with bed.running() as cluster:
            say("the CPU image")
            image, cache = apptainer.image(cluster), sites.model_cache()
            samples: Samples = {
                **cold_pool(cluster, image, cache, say),
                **handovers(cluster, image, cache, say),
            }
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been stopped")
        return 130
    print_table(samples)
    print(f"Written to {write_json(samples)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
