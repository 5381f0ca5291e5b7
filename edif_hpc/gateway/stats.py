"""What this gateway counts of itself, for /metrics. Plain numbers: they are touched on every request."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds in seconds."""


@dataclass
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass
class Stats:
    """`answers` counts HTTP answers by (route, status); `latency` by route."""

    answers: dict[tuple[str, int], int] = field(default_factory=dict)
    latency: dict[str, Histogram] = field(default_factory=dict)
    frames: int = 0
    downloads: int = 0
    download_bytes: int = 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.answers[route, status] = self.answers.get((route, status), 0) + 1
        self.latency.setdefault(route, Histogram()).observe(seconds)
