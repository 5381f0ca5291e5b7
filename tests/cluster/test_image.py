"""Workers that Slurm starts in the CPU image: the same numbers, an orderly end, and no secret inside."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import CLUSTER, Cluster

from . import site as sites
from .bed import text_of
from .site import Site
from .test_pools import POOL, ask

pytestmark = CLUSTER


@pytest.fixture(scope="module")
def site(slurm: Cluster, cache: Path, image: Path) -> Iterator[Site]:
    slurm.restore()
    with sites.running(slurm, cache, f'{POOL}image = "{image}"\n') as running:
        yield running


def test_a_request_runs_in_the_image_and_gives_the_same_numbers(site: Site) -> None:
    here, there = ask(site)
    assert (here == there).all()
    (worker,) = [row for row in site.json("ps") if row["name"].startswith("worker-")]
    assert worker["name"].endswith("-g1")


def test_the_image_does_not_tell_where_it_was_built_from(site: Site, image: Path) -> None:
    told = ""
    for what in ("--labels", "--deffile", "--all"):
        told += site.cluster.run(["apptainer", "inspect", what, image]).stdout
    inside = ["apptainer", "exec", "--containall", image, "grep", "-rhs", "http", "/etc/apt", "/etc/pip.conf", "/root"]
    told += site.cluster.run(inside, check=False).stdout
    assert "org.edif-hpc.kind" in told
    assert [part for part in told.split() if "://" in part and "://127.0.0.1:" not in part and "deb" in part] == []
    assert str(site.cluster.home) not in told


def test_no_secret_is_in_the_container(site: Site) -> None:
    ask(site)
    secrets = [site.key, *(path.read_text().strip() for path in (site.home / "secrets").iterdir() if path.is_file())]
    places = [text_of(pid, name) for pid in _all_pids(site) for name in ("environ", "cmdline")]
    assert any("--supervisor" in place for place in places)
    assert not [secret for secret in secrets for place in places if secret in place]


def test_a_stopped_pool_ends_its_worker_in_order(site: Site) -> None:
    ask(site)
    site.cli("pool", "stop", "main")
    site.cluster.wait(lambda: not site.cluster.jobs(), 60.0, "the end of the allocation")
    reports = [path.read_text() for path in (site.home / "allocations").glob("*.report.json")]
    assert all('"status":0' in report for report in reports)
    site.cli("pool", "resume", "main")


def test_the_supervisors_signals_reach_the_worker_in_the_container(site: Site) -> None:
    ask(site)
    job = next(row["job"] for row in site.json("allocations") if row["state"] == "running")
    (supervisor,) = [pid for pid in _all_pids(site) if _is_supervisor(pid)]
    os.kill(supervisor, signal.SIGTERM)
    site.cluster.wait(lambda: site.cluster.job(job) is None, 60.0, "the end of the allocation")
    assert '"event": "draining"' in site.logs()
    reports = [path.read_text() for path in (site.home / "allocations").glob("*.report.json")]
    assert all('"status":0' in report for report in reports)


def _is_supervisor(pid: int) -> bool:
    program, *arguments = text_of(pid, "cmdline").split("\0")
    return "python" in program and "submitit.core._submit" in arguments


def _all_pids(site: Site) -> list[int]:
    return [pid for node in ("node1", "node2") for pid in site.cluster.pids_on(node)]
