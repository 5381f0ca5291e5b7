"""Workers that a real Slurm starts on nodes where nothing is shared with the login side but files and one address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight.modeling.transformers import TransformersModel

from edif_hpc.fleet.slurm.text import parse_time
from tests.support import models
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .bed import text_of
from .site import Site

pytestmark = CLUSTER

POOL = '[[pool]]\nname = "main"\ncpus = 2\ntime = "00:10:00"\n'
PROMPT = "The Eiffel Tower is located in the city of"
SERVE_SECONDS = 90.0


@pytest.fixture(scope="module")
def site(slurm: Cluster, cache: Path) -> Iterator[Site]:
    slurm.restore()
    with sites.running(slurm, cache, POOL) as running:
        yield running
    slurm.wait(lambda: not slurm.jobs(), 30.0, "an empty queue after `down`")


def ask(site: Site) -> tuple[Any, Any]:
    """The same block here and through the service, with as many threads."""
    torch.set_num_threads(1)
    model = TransformersModel(models.repo_id("gpt2"), task="text-generation", dispatch=True)

    found = []
    with client_of(Stack(site.home, site.url, site.key)):
        for how in ({}, {"remote": True}):
            with model.trace(PROMPT, **how):
                logits = model.output.logits.save()
            found.append(logits)
    return found[0], found[1]


def test_a_request_runs_in_an_allocation_and_gives_the_same_numbers(site: Site) -> None:
    here, there = ask(site)
    assert (here == there).all()
    (allocation,) = site.json("allocations")
    assert (allocation["pool"], allocation["state"], allocation["generation"]) == ("main", "running", 1)
    assert allocation["node"] in ("node1", "node2")
    (pool,) = site.json("pool", "list")
    assert (pool["name"], pool["workers"]) == ("main", 1)


def test_the_worker_knows_when_slurm_ends_it(site: Site) -> None:
    ask(site)
    worker = next(row for row in site.json("ps") if row["name"].startswith("worker-"))
    said = site.cluster.run(["squeue", "--noheader", "--format=%e", f"--jobs={site.json('allocations')[0]['job']}"])
    assert worker["deadline"] == parse_time(said.stdout.strip())


def test_no_secret_is_where_others_may_look(site: Site) -> None:
    ask(site)
    secrets = [site.key, *(path.read_text().strip() for path in (site.home / "secrets").iterdir() if path.is_file())]
    pids = [pid for node in ("node1", "node2") for pid in site.cluster.pids_on(node)]
    places = [text_of(pid, name) for pid in pids for name in ("environ", "cmdline")]
    folder = site.home / "allocations"
    places += [path.read_bytes().decode(errors="replace") for path in folder.iterdir() if path.is_file()]
    assert any("edif_hpc.cli" in place for place in places)
    assert not [secret for secret in secrets for place in places if secret in place]


def test_a_stopped_pool_ends_its_workers_and_starts_none_until_it_may_again(site: Site) -> None:
    ask(site)
    site.cli("pool", "stop", "main")
    site.cluster.wait(lambda: not site.cluster.jobs(), 60.0, "the end of the allocation")
    assert site.json("pool", "list")[0]["state"] == "stopped"
    site.cli("pool", "resume", "main")
    here, there = ask(site)
    assert (here == there).all()


def test_an_image_that_is_not_there_is_named_to_those_who_wait(slurm: Cluster, cache: Path) -> None:
    with sites.running(slurm, cache, f'{POOL}image = "/nowhere/worker.sif"\n', external=True) as site:
        model = TransformersModel(models.repo_id("gpt2"), task="text-generation")
        with client_of(Stack(site.home, site.url, site.key)):
            with model.trace(PROMPT, remote=True, blocking=False) as tracer:
                model.output.logits.save()

            def told() -> str:
                tracer.backend()
                status = site.json("status", tracer.backend.job_id)
                return status["description"] if "ended early" in status["description"] else ""

            sentence = slurm.wait(told, SERVE_SECONDS, "the cause")
        assert "apptainer" in sentence or "/nowhere/worker.sif" in sentence
        assert "another is started in" in sentence


@pytest.mark.long
def test_while_slurm_is_silent_who_waits_is_told_and_served_later(site: Site) -> None:
    """slurmctld hangs: who waits is told why nothing is started, and served when it answers again."""
    site.cli("pool", "stop", "main")
    site.cluster.wait(lambda: not site.cluster.jobs(), 60.0, "the end of the allocation")
    model = TransformersModel(models.repo_id("gpt2"), task="text-generation")
    with client_of(Stack(site.home, site.url, site.key)):
        with site.cluster.paused_controller():
            site.cluster.wait(
                lambda: "nothing is known of the allocations" in site.logs(), 200.0, "an unanswered squeue"
            )
            site.cli("pool", "resume", "main")
            with model.trace(PROMPT, remote=True, blocking=False) as tracer:
                model.output.logits.save()
            tracer.backend()
            request = tracer.backend.job_id
            site.cluster.wait(
                lambda: "until Slurm answers" in site.json("status", request)["description"], 30.0, "the explanation"
            )
        site.cluster.wait(lambda: site.json("status", request)["status"] == "COMPLETED", 200.0, "the result")
