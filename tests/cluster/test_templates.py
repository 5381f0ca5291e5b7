"""A template that an ordinary user submits on a real Slurm: its worker serves, and its successor appears once.

In the CPU image, and where there is no Apptainer with an executable in its place that runs this installation instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from nnsight.modeling.transformers import TransformersModel

from edif_hpc.fleet.slurm import names
from tests.support import models
from tests.support.models import REPO
from tests.support.slurm import CLUSTER, Cluster
from tests.support.stack import Stack, client_of

from . import site as sites
from .site import Site

pytestmark = CLUSTER

POOL = '[[pool]]\nname = "cpu"\ncpus = 1\ntime = "00:10:00"\nmax_workers = 0\n'
PROMPT = "The Eiffel Tower is located in the city of"
SERVE_SECONDS = 90.0
BARE = """#!/bin/bash
# As a container would be: the allocation's folder stands for /tmp, and of the environment only what is named goes in.
named=()
for argument in "$@"; do
    case "$argument" in
        *:/tmp) scratch=${{argument%:/tmp}} ;;
        --env=*) named+=("${{argument#--env=}}") ;;
    esac
done
while [ "$1" != edif-hpc ]; do shift; done
shift
named=("${{named[@]//\\/tmp/$scratch}}")
set -- "${{@//\\/tmp\\/super/$scratch/super}}"
exec env -i PATH="$PATH" HOME="$HOME" "${{named[@]}}" {python} -P -m edif_hpc.cli "$@"
"""


@pytest.fixture(params=["image", "bare"])
def folder(request: pytest.FixtureRequest, cluster: Cluster) -> Path:
    """What a template needs: an image, and `bin` with an `apptainer` if it is not the machine's."""
    place = cluster.home / f"templates-{request.param}"
    cluster.run(["mkdir", "-p", place / "bin"])
    image = place / "worker-cpu.sif"
    if request.param == "bare":
        program = place / "bin" / "apptainer"
        program.write_text(BARE.format(python=sys.executable))
        program.chmod(0o755)
        image.touch()
        return place
    image.symlink_to(request.getfixturevalue("image"))
    return place


def _template(site: Site, folder: Path, cache: Path) -> Path:
    """The template as an admin fills it in."""
    text = (REPO / "slurm" / "worker-cpu.sbatch").read_text()
    for written, filled in {
        "/SHARED/edif-home": str(site.home),
        "/SHARED/images/worker-cpu.sif": str(folder / "worker-cpu.sif"),
        "/SHARED/hub": str(cache),
        "/SHARED/edif_hpc/slurm": str(REPO / "slurm"),
        "--time=24:00:00": "--time=00:10:00",
        "--cpus-per-task=8": "--cpus-per-task=1",
        "--mem=32G": "--mem=1G",
        "--output=edif-hpc-%j.log": f"--output={folder}/%j.log",
        "LEAST_UPTIME=60": "LEAST_UPTIME=1",
        "# Where Apptainer is a module:": (
            f"PATH={folder}/bin:$PATH\nexport TMPDIR={folder}/$SLURM_JOB_ID\nmkdir $TMPDIR"
        ),
    }.items():
        assert written in text
        text = text.replace(written, filled)
    path = folder / "worker-cpu.sbatch"
    path.write_text(text)
    return path


def test_a_template_serves_and_gets_its_successor_once(cluster: Cluster, cache: Path, folder: Path) -> None:
    with sites.running(cluster, cache, POOL) as site:
        job = cluster.run(["sbatch", "--parsable", _template(site, folder, cache)]).stdout.strip()
        cluster.wait_running(job)
        (asks,) = cluster.wait(lambda: list((folder / job).glob("*/supervisor/asks")), SERVE_SECONDS, "the pipes")
        assert _answer(site)

        (first,) = _allocations(cluster, site)
        assert first.generation == 1
        for _ in range(2):
            cluster.run(["bash", "-c", f"echo successor 2 > {asks}"])
        log = folder / f"{job}.log"
        cluster.wait(lambda: log.read_text().count("successor 2 submitted") == 2, 30.0, "two answers")
        assert sorted(_allocations(cluster, site), key=lambda name: name.generation) == [first, first.next]
        cluster.cancel_all()
        cluster.wait(lambda: not list((folder / job).iterdir()), 30.0, "a node without our files")


def _allocations(cluster: Cluster, site: Site) -> list[names.Name]:
    return [name for job in cluster.jobs() if (name := names.read(job.name, site.home))]


def _answer(site: Site) -> bool:
    """Whether a request gives what it gives here, with as many threads."""
    torch.set_num_threads(1)
    model = TransformersModel(models.repo_id("gpt2"), task="text-generation", dispatch=True)
    found = []
    with client_of(Stack(site.home, site.url, site.key)):
        for how in ({}, {"remote": True}):
            with model.trace(PROMPT, **how):
                logits = model.output.logits.save()
            found.append(logits)
    return bool((found[0] == found[1]).all())
