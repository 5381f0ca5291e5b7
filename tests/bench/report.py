"""Numbers into a table and a JSON file: each beside the floor's, with the target and whether it was met.

A target is a bound on a ratio to the floor measured in the same run, or on an absolute value. Missing one fails
nothing: machines differ, and a benchmark is never a test.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .subjects import FLOOR

PACKAGES = ("edif-hpc", "nnsight", "torch", "transformers", "redis", "uvicorn", "starlette", "websockets")
COLUMNS = 190

Values = dict[str, dict[str, float]]
"""Metric -> subject -> value."""


@dataclass(frozen=True)
class Metric:
    """One row. `better` is "less" or "more"."""

    name: str
    title: str
    unit: str
    better: str = "less"


METRICS = [
    *(
        Metric(f"{client}/{model}/{which}", f"{client} client, {model}, {which}", "ms")
        for model in ("tiny", "smollm2")
        for client in ("stock", "lean")
        for which in ("p50", "p95")
    ),
    Metric("overhead/p50", "server overhead, lean, tiny, p50", "ms"),
    Metric("overhead/p95", "server overhead, lean, tiny, p95", "ms"),
    *(Metric(f"throughput/{n}", f"requests/s, {n} lean client{'s' * (n > 1)}", "/s", "more") for n in (1, 8, 32)),
    Metric("burst", "non-blocking burst of {burst}", "/s", "more"),
    Metric("large", "140 MB result, beyond compute", "s"),
    Metric("first_result", "up to first result, cold home", "s"),
    Metric("gateway_start", "gateway start to answering", "s"),
    Metric("gateway_memory", "gateway memory after {requests} requests (RSS)", "MiB"),
    Metric("service_memory", "all but host, zygote, executors (PSS)", "MiB"),
]


@dataclass(frozen=True)
class Target:
    """A bound for one metric at some levels; `ratio` when it bounds the ratio to the floor."""

    metric: str
    levels: tuple[str, ...]
    bound: float
    ratio: bool = False


ALL = ("none", "process", "locked")
TARGETS = [
    *(Target(f"stock/{model}/p50", ("none",), 1.1, True) for model in ("tiny", "smollm2")),
    Target("lean/tiny/p50", ("none",), 1.4, True),
    Target("lean/tiny/p50", ("locked",), 3.0, True),
    Target("throughput/32", ("none",), 0.7, True),
    Target("throughput/32", ("process", "locked"), 0.12, True),
    Target("burst", ("none",), 100.0),
    Target("first_result", ALL, 15.0),
    Target("gateway_start", ALL, 1.5),
    Target("gateway_memory", ALL, 100.0),
    Target("service_memory", ALL, 500.0),
]


def verdicts(values: Values) -> list[dict[str, Any]]:
    """Every target that this run can judge, with what was measured."""
    better = {metric.name: metric.better for metric in METRICS}
    found = []
    for target in TARGETS:
        for level in target.levels:
            measured = values.get(target.metric, {}).get(level)
            base = values.get(target.metric, {}).get(FLOOR)
            if measured is None or (target.ratio and not base):
                continue
            value = measured / base if target.ratio and base else measured
            met = value <= target.bound if better[target.metric] == "less" else value >= target.bound
            found.append(
                {"metric": target.metric, "level": level, "ratio": target.ratio, "bound": target.bound,
                 "value": value, "met": met}
            )  # fmt: skip
    return found


def print_table(values: Values, subjects: list[str], names: dict[str, Any]) -> None:
    judged = verdicts(values)
    table = Table(title="edif_hpc beside the floor (in brackets: times the floor)", header_style="bold")
    table.add_column("")
    for subject in subjects:
        table.add_column(subject, justify="right")
    table.add_column("targets")
    for metric in METRICS:
        row = values.get(metric.name)
        if row:
            cells = [_cell(row.get(subject), row.get(FLOOR), metric, subject == FLOOR) for subject in subjects]
            targets = "  ".join(_verdict(each, metric) for each in judged if each["metric"] == metric.name)
            table.add_row(f"{metric.title.format(**names)} [{metric.unit}]".replace("[", r"\["), *cells, targets)
    console = Console()
    if not console.is_terminal:
        console = Console(width=COLUMNS)
    console.print(table)
    missed = [each for each in judged if not each["met"]]
    console.print(f"{len(judged) - len(missed)} of {len(judged)} targets met.")


def _cell(value: float | None, base: float | None, metric: Metric, is_floor: bool) -> str:
    if value is None:
        return "-"
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return text if is_floor or not base or metric.name.startswith("overhead") else f"{text} ({value / base:.2f})"


def _verdict(judged: dict[str, Any], metric: Metric) -> str:
    sign = "<=" if metric.better == "less" else ">="
    unit = "x" if judged["ratio"] else f" {metric.unit}"
    colour, word = ("green", "met") if judged["met"] else ("red", "not met")
    return f"{judged['level']} {sign} {judged['bound']:g}{unit}: [{colour}]{word}[/{colour}]"


def write_json(folder: Path, values: Values, samples: dict[str, Any], facts: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    content = {"machine": machine(), "run": facts, "values": values, "targets": verdicts(values), "samples": samples}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "versions": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    lines: Callable[[], list[str]] = Path("/proc/cpuinfo").read_text().splitlines
    return next((line.partition(":")[2].strip() for line in lines() if line.startswith("model name")), "unknown")
