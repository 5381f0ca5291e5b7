"""The cluster that all tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.slurm import Cluster

from . import bed


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, as whoever used it before left it. For what lives longer than a test; else take `cluster`."""
    reason = bed.obstacle()
    if reason:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
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
