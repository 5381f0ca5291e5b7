"""`make bench`: measures the service at every isolation level beside the floor, in one run, and prints a table.

All subjects stay up and are measured in turn, a little each time and many times round: a machine that is busy for a
while is busy for all of them, so ratios hold where absolute numbers do not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from edif_hpc.core.isolation import Isolation
from tests.support.models import REPO, test_cache

from . import asks as ask_module
from . import lean, measures, report, subjects
from .asks import TINY, Ask
from .subjects import Subject

PARTS = ("latency", "overhead", "throughput", "burst", "large", "start", "gateway", "memory")
CLIENTS = (1, 8, 32)
WARM_UPS = 10
STEP_SECONDS = 240
"""No step takes longer: a subject that stopped answering must end the run, and the stock client waits for ever."""
RESULTS = REPO / "bench-results"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    latencies: int
    time_box: float
    burst: int
    large: int
    gateway_requests: int


FULL = Plan(rounds=6, latencies=12, time_box=3.0, burst=700, large=3, gateway_requests=1000)
QUICK = Plan(rounds=2, latencies=8, time_box=1.5, burst=100, large=1, gateway_requests=100)


@dataclass
class Bench:
    """One run: who is measured with what, and all samples so far."""

    plan: Plan
    parts: tuple[str, ...]
    asks: list[Ask]
    say: Callable[[str], None]
    people: list[Subject] = field(default_factory=list)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, metric: str, subject: Subject, *values: float) -> None:
        self.samples.setdefault(metric, {}).setdefault(subject.name, []).extend(values)

    @property
    def tiny(self) -> Ask:
        return next(ask for ask in self.asks if ask.name == TINY)

    @property
    def services(self) -> list[Subject]:
        return [subject for subject in self.people if subject.home is not None]

    def measure(self) -> None:
        for subject in self.people:
            for ask in self.asks:
                self.say(f"warming up: {subject.name}, {ask.name}")
                measures.stock_latencies(subject, ask, WARM_UPS)
                measures.lean_latencies(subject, ask, WARM_UPS)
        for number in range(self.plan.large if "large" in self.parts else 0):
            for subject in self.people:
                self.say(f"140 MB result {number + 1} of {self.plan.large}: {subject.name}")
                self.add("large", subject, measures.large(subject, self.tiny))
        for subject in self.services:
            self._size(subject)
        for number in range(self.plan.rounds):
            for subject in self.people:
                self._round(subject, f"round {number + 1} of {self.plan.rounds}: {subject.name}")
        if "burst" in self.parts:
            for subject in self.services:
                self.say(f"burst of {self.plan.burst}: {subject.name}")
                self.add("burst", subject, measures.burst(subject, self.tiny, self.plan.burst))

    def _round(self, subject: Subject, where: str) -> None:
        if {"latency", "overhead"} & set(self.parts):
            for ask in self.asks:
                self.say(f"{where}, latency, {ask.name}")
                self.add(f"stock/{ask.name}", subject, *measures.stock_latencies(subject, ask, self.plan.latencies))
                answers = measures.lean_latencies(subject, ask, self.plan.latencies)
                self.add(f"lean/{ask.name}", subject, *(answer.seconds for answer in answers))
                if ask.name == TINY and subject.home is not None:
                    self.add("overhead", subject, *measures.overheads(subject, answers))
        if "throughput" in self.parts:
            for clients in CLIENTS:
                self.say(f"{where}, {clients} lean clients")
                rate = measures.throughput(subject, self.tiny, clients, self.plan.time_box)
                self.add(f"throughput/{clients}", subject, rate)

    def _size(self, subject: Subject) -> None:
        """Memory after as many requests at every level: Redis keeps their results for a while."""
        if not {"memory", "gateway"} & set(self.parts):
            return
        self.say(f"memory after {self.plan.gateway_requests} requests: {subject.name}")
        memory = measures.gateway_memory(subject, self.tiny, self.plan.gateway_requests)
        if "memory" in self.parts:
            for component, mebibytes in measures.service_memory(subject).items():
                self.add(f"memory/{component}", subject, mebibytes)
        if "gateway" in self.parts:
            self.add("gateway_memory", subject, memory)
            self.say(f"gateway's start: {subject.name}")
            self.add("gateway_start", subject, measures.gateway_start(subject))

    def values(self) -> report.Values:
        """The numbers of the table, in its units."""
        found: report.Values = {}
        for metric, by_subject in self.samples.items():
            for subject, values in by_subject.items():
                if metric.startswith(("stock/", "lean/", "overhead")):
                    found.setdefault(f"{metric}/p50", {})[subject] = 1000 * measures.p50(values)
                    found.setdefault(f"{metric}/p95", {})[subject] = 1000 * measures.p95(values)
                elif metric.startswith("memory/"):
                    total = found.setdefault("service_memory", {})
                    total[subject] = total.get(subject, 0.0) + sum(values)
                else:
                    found.setdefault(metric, {})[subject] = measures.p50(values)
        if "large" in found:
            compute = ask_module.local_large(measures.seconds)
            self.samples["large_compute"] = {"local": [compute]}
            found["large"] = {subject: value - compute for subject, value in found["large"].items()}
        return found


@contextlib.contextmanager
def everybody(bench: Bench, hub: Path, levels: list[str], threads: int, folder: Path) -> Iterator[None]:
    """The floor and a service per level, up side by side."""

    def first(subject: Subject) -> None:
        measures.lean_latencies(subject, bench.tiny, 1)

    with contextlib.ExitStack() as stack:
        bench.say("starting: the floor")
        bench.people.append(stack.enter_context(subjects.floor(folder / "floor", hub, bench.asks, threads)))
        for level in levels:
            bench.say(f"starting in a cold home: {level}")
            started = subjects.service(folder / level, hub, level, threads, first)
            subject, seconds = stack.enter_context(started)
            bench.people.append(subject)
            if "start" in bench.parts:
                bench.add("first_result", subject, seconds)
        yield
        bench.say("stopping")


def main() -> int:
    options = _options()
    plan = QUICK if options.quick else FULL
    console = Console(stderr=True)
    began = time.monotonic()

    def say(line: str) -> None:
        signal.alarm(STEP_SECONDS)
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False)

    torch.set_num_threads(1)
    hub, missing = ask_module.lay_models(test_cache() / "bench", say)
    if missing:
        say(f"without SmolLM2: {missing}")
    asks = [ask_module.tiny()] + ([] if missing or options.quick else [ask_module.smollm2()])
    bench = Bench(plan, tuple(options.only), asks, say)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGALRM, _stuck)
    folder = Path(tempfile.mkdtemp(prefix="edif-hpc-bench-"))
    load_before = os.getloadavg()[0]
    try:
        with everybody(bench, hub, options.levels, options.threads, folder):
            bench.measure()
        values = bench.values()
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been stopped")
        return 130
    except (lean.RemoteFailure, TimeoutError) as error:
        say(f"given up: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts: dict[str, Any] = {
        "seconds": round(time.monotonic() - began), "load_before": load_before, "plan": vars(plan),
        "threads": options.threads, "without_smollm2": missing,
    }  # fmt: skip
    names = {"burst": plan.burst, "requests": plan.gateway_requests}
    report.print_table(values, [subject.name for subject in bench.people], names)
    print(f"Written to {report.write_json(RESULTS, values, bench.samples, facts)}")
    return 0


def _stuck(number: int, frame: object) -> None:
    raise TimeoutError(f"the last step took longer than {STEP_SECONDS} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a first impression: the tiny model, few samples")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of floor and workers alike (default 1)")
    parser.add_argument("--levels", type=_list_of(tuple(Isolation)), default=list(Isolation), metavar="L,L",
                        help="isolation levels (default: none,process,locked)")  # fmt: skip
    parser.add_argument("--only", type=_list_of(PARTS), default=list(PARTS), metavar="P,P",
                        help=f"parts, of {','.join(PARTS)}")  # fmt: skip
    return parser.parse_args()


def _list_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for each in chosen:
            if each not in allowed:
                raise argparse.ArgumentTypeError(f"{each!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


if __name__ == "__main__":
    sys.exit(main())
