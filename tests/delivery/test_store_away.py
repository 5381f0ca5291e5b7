"""The object store goes away with results on their way to it: they wait on disk, and are stored or given up in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import S3Process, eventually
from tests.support.stack import Stack, client_of

from .scene import (
    MIB,
    PATIENCE,
    completed,
    events,
    large,
    lines,
    pids,
    post,
    reached,
    serves,
    service,
    shown,
    small,
    soon,
    worker,
)

WAITS = "The object store is away: your result is kept on its worker and stored when it is back."
SPOOL = 5 * MIB
"""Room for one large result, and not for two."""
GIVEN_UP_SECONDS = 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, cache: Path, store: S3Process) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("away") / "home"
    with service(home, cache, store, spool_bytes=SPOOL, upload_seconds=600) as found:
        yield found


@pytest.fixture
def away(store: S3Process, stack: Stack) -> Iterator[S3Process]:
    store.kill()
    yield store
    store.kill()
    store.start()


def waits(stack: Stack, request_id: str) -> None:
    soon(stack, lambda: WAITS in lines(stack, request_id), PATIENCE, "the line that says so")
    assert shown(stack, request_id)["status"] == "RUNNING"


def held_in_memory(stack: Stack, name: str) -> int:
    """Bytes of results that this worker holds in memory."""
    folder, found = Path(f"/proc/{pids(stack)[name]}/fd"), 0
    for link in folder.iterdir():
        try:
            if "edif-result" in os.readlink(link):
                found += link.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at a worker's descriptors")
def test_results_wait_on_disk_up_to_the_limit_and_the_model_serves_on(stack: Stack, gpt2: Any, away: S3Process) -> None:
    with worker(stack, "worker-a"):
        first = large(gpt2)
        waits(stack, first)
        completed(stack, small(gpt2))
        eventually(lambda: held_in_memory(stack, "worker-a") < MIB, 30, "the result leaving the memory")
        second = large(gpt2)
        waits(stack, second)  # no room: it keeps its place, and its model takes nothing more
        assert held_in_memory(stack, "worker-a") > 3 * MIB
        claimed = shown(stack, second)["claimed"]
        eventually(lambda: time.time() > claimed + 1, what="nothing being claimed ahead of it")
        third = small(gpt2)
        assert shown(stack, third)["status"] in ("QUEUED", "DISPATCHED")
        away.start()
        for request_id in (first, second, third):
            assert completed(stack, request_id)["attempt"] == 1
        assert lines(stack, first) == [WAITS]
        eventually(lambda: held_in_memory(stack, "worker-a") < MIB, 30, "no result in memory")


@pytest.fixture
def hanging(store: S3Process, stack: Stack) -> Iterator[S3Process]:
    """A store that takes connections and answers nothing: uploads hang, and cannot be interrupted."""
    assert store.process is not None
    store.process.send_signal(signal.SIGSTOP)
    yield store
    store.process.send_signal(signal.SIGCONT)


@pytest.fixture
def impatient(tmp_path_factory: pytest.TempPathFactory, cache: Path, stack: Stack, store: S3Process) -> Iterator[Stack]:
    """A service of its own that gives results up soon."""
    home = tmp_path_factory.mktemp("impatient") / "home"
    with service(home, cache, store, upload_seconds=GIVEN_UP_SECONDS) as found, client_of(found):
        yield found


def test_a_result_that_is_never_stored_is_an_error_in_time(impatient: Stack, gpt2: Any, away: S3Process) -> None:
    stack = impatient
    with worker(stack, "worker-a"):
        request_id = large(gpt2)
        waits(stack, request_id)
        cancelled = large(gpt2)
        waits(stack, cancelled)
        post(stack, f"/api/requests/{cancelled}/cancel")
        assert reached(stack, cancelled, "ERROR")["description"] == "Cancelled."
        found = reached(stack, request_id, "ERROR")
        assert f"away for {GIVEN_UP_SECONDS} s" in found["description"]
        assert f"edif-hpc requests retry {request_id}" in found["description"]
        away.start()
        completed(stack, post(stack, f"/api/requests/{request_id}/retry")["id"])


def test_a_worker_whose_time_ends_gives_the_request_back_before_its_deadline(
    stack: Stack, gpt2: Any, hanging: S3Process
) -> None:
    deadline = time.time() + 60
    with worker(stack, "worker-a", "--deadline", str(deadline)) as ending:
        serves(stack, "worker-a")
        request_id = large(gpt2)
        reached(stack, request_id, "RUNNING")
        assert ending.wait(PATIENCE) == 0
        assert time.time() < deadline + 1
    released = [(text, at) for status, text, at in events(stack, request_id) if status == "QUEUED"][-1]
    assert released[0] == "Back in the queue: the object store was away when its worker had to end."
    assert released[1] < deadline
    hanging.process.send_signal(signal.SIGCONT)
    with worker(stack, "worker-b"):
        assert completed(stack, request_id)["attempt"] == 2
