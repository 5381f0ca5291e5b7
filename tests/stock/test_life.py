"""A service over its life: before its first worker, with one, and after that has gone again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
from nnsight.intervention.backends.remote import AsyncRemoteBackend

from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import Stack, client_of, running

from .support import ORDER, ask, result_of, seen_by, tiny, works

pytestmark = pytest.mark.xdist_group("stock-life")

SETTINGS = """
[worker]
threads = 1
heartbeat_seconds = 1
idle_seconds = 2
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("stock-life") / "home", cache, "none", SETTINGS) as found:
        yield found


@pytest.fixture
def stack(service: Stack, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setattr("nnsight.ndif._REMOTE_ENV", None)
    models.offline_client(cache)
    with client_of(service):
        yield service


def workers(stack: Stack) -> list[Any]:
    return stack.json("status")["workers"]


def test_from_no_worker_to_one_and_back(stack: Stack) -> None:
    """In order, since each step needs the one before it."""
    # Before any worker ever was.
    assert workers(stack) == []
    before = nnsight.compare()
    assert before.python_matches
    assert before.critical_mismatches == {}
    assert nnsight.status().status.value == "DOWN"
    assert len(nnsight.status()) == 0
    levels = {entry["deployment_level"] for entry in nnsight.status(raw=True)["deployments"].values()}
    assert levels == {"COLD"}

    # The first request brings one up, and is told each step.
    first = ask(tiny(), 1, blocking=False)
    statuses, result = seen_by(ask(tiny(), 2, AsyncRemoteBackend))
    names = [update.status.value for update in statuses]
    assert names == sorted(names, key=ORDER.index)
    # The worker that the first one brings up may be there before the second is told of it.
    assert {"QUEUED", "DEPLOYING", "DISPATCHED", "RUNNING", "COMPLETED"} <= set(names)
    said = stack.cli("logs", first.job_id).stdout
    assert [name for name in ORDER[1:] if name in said] == ORDER[1:]
    assert all(update.description for update in statuses if update.status.value != "COMPLETED")
    assert float(result["answer"]) == 2
    assert float(result_of(first)["answer"]) == 1
    eventually(lambda: nnsight.status().status.value == "UP", 10, "the status with it")

    # Idle, it goes; what it did stays.
    eventually(lambda: not workers(stack), 30, "the idle worker's end")
    eventually(lambda: nnsight.status().status.value == "DOWN", 10, "the status without it")
    assert float(first.poll()["answer"]) == 1
    nnsight.ndif._REMOTE_ENV = None
    assert nnsight.compare().critical_mismatches == {}

    # And the next request brings another one up.
    works(tiny())
    assert len(workers(stack)) == 1
