"""/metrics for Prometheus: this gateway's own numbers, the queue's from Redis, the workers' from their heartbeats.

It names models and workers, so it is for admins and keys tagged `metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from edif_hpc.core.queue import Queue, keys
from edif_hpc.core.registry import WorkerRecord
from edif_hpc.core.tally import slurm_commands
from edif_hpc.core.target import Target

from .auth import METRICS_TAG, Auth
from .observed import Observed
from .sessions import Sessions
from .stats import BUCKETS, Stats

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Metrics:
    def __init__(self, auth: Auth, queue: Queue, observed: Observed, sessions: Sessions, stats: Stats) -> None:
        self.auth = auth
        self.queue = queue
        self.observed = observed
        self.sessions = sessions
        self.stats = stats

    async def get(self, request: Request) -> Response:
        await self.auth.admin(request, METRICS_TAG)
        # Imported on first use: most gateways are never scraped, and all of them are to start fast.
        from prometheus_client import generate_latest
        from prometheus_client.registry import CollectorRegistry

        counters = await self.queue.redis.hgetall(keys.COUNTERS)
        waiting, workers = await self.queue.waiting(), await self.observed.workers()
        given = (await slurm_commands(self.queue.redis))["total"]
        families = [*self._own(), *_counters(counters), *_slurm(given), *_queue(waiting), *_workers(workers)]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collected(families))
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _own(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        answers = CounterMetricFamily("edif_http_answers", "HTTP answers.", labels=["route", "status"])
        for (route, status), count in self.stats.answers.items():
            answers.add_metric([route, str(status)], count)
        yield answers
        latency = HistogramMetricFamily("edif_http_seconds", "Time to answer.", labels=["route"])
        for route, histogram in self.stats.latency.items():
            latency.add_metric([route], _cumulative(histogram.counts), histogram.total)
        yield latency
        yield GaugeMetricFamily("edif_sockets", "Open client sockets.", value=len(self.sessions.open))
        yield GaugeMetricFamily(
            "edif_followed", "Requests followed for sockets and waits.", value=len(self.sessions.follower.followings)
        )
        yield GaugeMetricFamily(
            "edif_doorbell_connected", "Whether Redis is heard.", value=int(self.sessions.follower.connected)
        )
        yield CounterMetricFamily("edif_frames", "Frames sent to sockets.", value=self.stats.frames)
        yield CounterMetricFamily("edif_downloads", "Result downloads begun.", value=self.stats.downloads)
        yield CounterMetricFamily("edif_download_bytes", "Bytes of result downloads begun.", self.stats.download_bytes)


class _Collected:
    """prometheus_client collects from objects; these values were collected before."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
    return [(bound, sum(counts[: index + 1])) for index, bound in enumerate(bounds)]


def _counters(counters: dict[bytes, bytes]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily("edif_queue_events", "Totals since Redis was first used.", labels=["event"])
    for name, value in sorted(counters.items()):
        family.add_metric([name.decode()], float(value))
    yield family


def _slurm(given: dict[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily("edif_slurm_commands", "Commands given to Slurm, on any machine.", labels=["command"])
    for command, number in given.items():
        family.add_metric([command], number)
    yield family


def _queue(waiting: dict[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily("edif_waiting", "Requests that wait, by model.", labels=["model", "revision"])
    totals: dict[tuple[str, str], int] = {}
    for target, count in waiting.items():
        for key in Target.parse(target).keys:
            labels = (key.repo_id, key.revision or "main")
            totals[labels] = totals.get(labels, 0) + count
    for labels, total in totals.items():
        family.add_metric(labels, total)
    yield family


def _workers(workers: list[WorkerRecord]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    readings: list[tuple[str, str, Any]] = [
        ("edif_worker_up", "1 for each worker that lives.", lambda worker: 1),
        ("edif_worker_running", "Requests running.", lambda worker: worker.running),
        ("edif_worker_completed", "Requests completed since it started.", lambda worker: worker.completed),
        ("edif_worker_memory_used_bytes", "Memory of its models.", lambda worker: worker.memory_used),
        ("edif_worker_memory_budget_bytes", "Memory it may use for models.", lambda worker: worker.memory_budget),
        ("edif_worker_age_seconds", "Since it started.", lambda worker: time.time() - worker.started),
        ("edif_worker_models", "Models ready.", lambda w: sum(model.state == "ready" for model in w.models)),
    ]
    for name, text, reading in readings:
        family = GaugeMetricFamily(name, text, labels=["worker", "pool", "state", "device"])
        for worker in workers:
            family.add_metric([worker.worker_id, worker.pool, worker.state, worker.device], reading(worker))
        yield family
