"""The cluster that all tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import Cluster

from . import apptainer, bed
from . import site as sites


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, as whoever used it before left it. For what lives longer than a test; else take `cluster`."""
    _insist(bed.obstacle())
    before = os.umask(0o022)  # what is made for the ordinary user must be readable to it
    try:
        with bed.running() as cluster:
            yield cluster
    finally:
        os.umask(before)


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with two idle nodes and an empty queue, put back to that at the end."""
    slurm.restore()
    yield slurm
    slurm.restore()


@pytest.fixture(scope="module")
def cache() -> Path:
    return sites.model_cache()


@pytest.fixture(scope="session")
def image(slurm: Cluster) -> Path:
    """The CPU image with what this checkout holds."""
    _insist(apptainer.obstacle())
    return apptainer.image(slurm)


def _insist(obstacle: str) -> None:
    """In CI what is missing is a failure; elsewhere the tests that need it are skipped."""
    if obstacle:
        if os.environ.get("CI") == "true":
            pytest.fail(obstacle)
        pytest.skip(obstacle)
