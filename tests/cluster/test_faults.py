"""What clusters do to a service, one after the other, each with a request in flight that must be answered once.

They take minutes, since Slurm does: it looks at its nodes every some seconds, and the service asks it once a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import models
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .site import Site
from .stream import READY, Stream, reached, stream_of, words

pytestmark = [*CLUSTER, pytest.mark.long]

POOL = '[[pool]]\nname = "main"\ncpus = 1\ntime = "{time}"\n'
BACKOFF_SECONDS = [1.0, 2.0]
SERVE_SECONDS = 90.0
REPLACED_SECONDS = 400.0
"""A node is missed, Slurm asked, a back-off waited for, and a worker started."""
OUTAGE_SECONDS = 60.0
DUE_SECONDS = 160.0
"""Of five minutes, some time before a successor may be asked for: half of them, however slow this machine is."""
RUN_SECONDS = 25.0


@contextmanager
def service(cluster: Cluster, cache: Path, pool: str) -> Iterator[Stream]:
    with sites.running(cluster, cache, pool) as site, client_of(Stack(site.home, site.url, site.key)):
        yield stream_of(site, {"main": models.repo_id("gpt2")})


def in_flight(stream: Stream) -> tuple[str, dict[str, str]]:
    """A request that runs by now, and the allocation that serves it."""
    request = stream.hold("main", RUN_SECONDS)
    site = stream.site
    site.cluster.wait(lambda: stream.status(request) == "RUNNING", SERVE_SECONDS, "a run")
    (row,) = [row for row in site.json("allocations") if row["state"] == "running"]
    return request, row


def state_of(site: Site, job: str) -> str:
    return next((str(row["state"]) for row in site.json("allocations") if row["job"] == job), "unknown")


def test_a_persons_scancel(cluster: Cluster, cache: Path) -> None:
    """scancel of a worker: what ran goes back, the pool is held, and when it is resumed the request is served."""
    with service(cluster, cache, POOL.format(time="00:20:00")) as stream:
        request, row = in_flight(stream)
        site = stream.site
        cluster.run(["scancel", row["job"]])
        cluster.wait(lambda: site.json("pool", "list")[0]["state"] == "held", 150.0, "the pool being held")
        assert cluster.jobs() == []
        assert stream.status(request) != "COMPLETED"
        site.cli("pool", "resume", "main")
        stream.finish(REPLACED_SECONDS)
        stream.assert_served_once()


def test_a_node_goes_down(cluster: Cluster, cache: Path) -> None:
    """A node goes down with a request that runs on it: it runs on the other one."""
    with service(cluster, cache, POOL.format(time="00:20:00")) as stream:
        _, row = in_flight(stream)
        cluster.stop(row["node"])
        stream.finish(REPLACED_SECONDS)
        stream.assert_served_once()
        (serving,) = [each for each in stream.site.json("allocations") if each["state"] == "running"]
        assert serving["node"] != row["node"]


def test_slurmctld_is_stopped_for_a_minute(cluster: Cluster, cache: Path) -> None:
    """slurmctld is stopped for a minute, when a successor is due: it comes later, once, and nobody notices."""
    with service(cluster, cache, POOL.format(time="00:05:00")) as stream:
        site = stream.site
        stream.until(reached(site, "main", READY, 1), SERVE_SECONDS, "a worker")
        stream.until(lambda: site.json("allocations")[0]["left"] < DUE_SECONDS, 300.0, "the time before a handover")
        cluster.stop("slurmctld")
        over = time.monotonic() + OUTAGE_SECONDS
        stream.until(
            lambda: time.monotonic() > over and words(site, "main", "no successor"), DUE_SECONDS, "an outage in the way"
        )
        cluster.start("slurmctld")
        stream.until(reached(site, "main", READY, 2), REPLACED_SECONDS, "a successor")
        stream.finish()
        stream.assert_served_once()
        rows = site.json("allocations")
        assert sorted(row["generation"] for row in rows) == [1, 2]
        assert "slurm" in words(site, "main", "no successor")[0].fields["error"].lower()


def test_preemption(cluster: Cluster, cache: Path) -> None:
    """A preempted allocation gives back what it runs, and its pool begins anew when there is room."""
    with service(cluster, cache, POOL.format(time="00:20:00") + 'partition = "scavenge"\n') as stream:
        _, row = in_flight(stream)
        urgent = cluster.submit("sleep 30\n", "--partition=gpu", "--nodes=2", "--exclusive", "--time=2")
        cluster.wait_running(urgent, 60.0)
        assert state_of(stream.site, row["job"]) == "preempted"
        stream.finish(REPLACED_SECONDS)
        stream.assert_served_once()
        assert stream.site.json("pool", "list")[0]["state"] == ""


@pytest.mark.usefixtures("image")  # for Apptainer, which refuses the broken one
def test_an_image_that_cannot_start(cluster: Cluster, cache: Path) -> None:
    """An image that cannot start: back-off, then a pause, and everybody is told the cause; resuming tries again."""
    image = cluster.home / "broken.sif"
    image.write_text("this is no image\n")
    os.chown(image, cluster.uid, cluster.gid)
    fleet = f"[fleet]\nbackoff_seconds = {BACKOFF_SECONDS}\n"
    with service(cluster, cache, f'{fleet}{POOL.format(time="00:20:00")}image = "{image}"\n') as stream:
        site = stream.site
        stream.ask()
        (request,) = stream.open
        told: set[str] = set()

        def refused() -> bool:
            seen = site.json("status", request)
            told.add(seen["description"])
            return bool(seen["status"] == "ERROR")

        cluster.wait(refused, REPLACED_SECONDS, "the refusal")
        cause = site.json("status", request)["description"]
        assert str(image) in cause or "image" in cause
        assert any("another is started in" in sentence for sentence in told)
        assert len(site.json("allocations")) == len(BACKOFF_SECONDS) + 1
        notice = site.json("status")["notices"]["pool:main"]
        assert "edif-hpc pool resume main" in notice
        assert "image" in notice
        site.cli("pool", "resume", "main")
        stream.open.clear()
        stream.ask()
        cluster.wait(lambda: len(site.json("allocations")) > len(BACKOFF_SECONDS) + 1, 90.0, "another try")
