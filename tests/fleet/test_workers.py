"""The fleet launching real worker processes when requests wait, and what it says when none can be had."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from edif_hpc.core.endpoints import redis_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.queue import Queue, Submission
from edif_hpc.core.settings import LimitSettings, Settings
from tests.cli.stack import Stack, stack
from tests.support.servers import eventually

T = TypeVar("T")

TARGET = (
    'nnsight.modeling.transformers.TransformersModel:{"repo_id": "nobody/nothing", "revision": null, '
    '"task": "text-generation"}'
)


def with_queue(made: Stack, work: Callable[[Queue], Awaitable[T]]) -> T:
    async def run() -> T:
        redis = redis_endpoint(Home(made.home), Settings()).client()
        try:
            return await work(Queue(redis, LimitSettings()))
        finally:
            await redis.aclose()

    return asyncio.run(run())


def submit(made: Stack, request_id: str) -> None:
    with_queue(made, lambda queue: queue.submit(Submission(request_id, "ada", TARGET, "trace", {}, b"x")))


def status(made: Stack, request_id: str) -> tuple[str, str]:
    found = with_queue(made, lambda queue: queue.describe(request_id)) or {}
    return found.get("status", ""), found.get("description", "")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as made:
        yield made


def workers(made: Stack) -> dict[str, int]:
    return {name: pid for name, pid in made.pids().items() if name.startswith("worker-")}


def test_a_request_brings_a_worker_up_and_an_unknown_model_is_an_error(own: Stack):
    own.up()
    submit(own, "r1")
    found = eventually(lambda: workers(own), 30, "a worker")
    assert len(found) == 1
    _, why = eventually(
        lambda: (told := status(own, "r1"))[0] == "ERROR" and told, 60, "an answer for a model that is not there"
    )
    assert "nobody/nothing" in why
    rows = {row["name"]: row for row in own.json("ps")}
    worker = rows[next(iter(found))]
    assert worker["pool"] == "local"
    assert worker["isolation"] in ("none", "process", "locked")
    # It lives on when the fleet dies, the next fleet knows it, and `down` finds it.
    own.back("fleet", own.kill("fleet"))
    submit(own, "r2")
    eventually(lambda: status(own, "r2")[0] == "ERROR", 60, "an answer")
    assert workers(own) == found
    own.down()
    assert own.processes() == []


def test_workers_that_die_young_pause_their_pool_with_the_reason_until_it_is_resumed(tmp_path: Path):
    # It is told to use what the machine has not, so each worker ends at once, with a sentence.
    variables = {
        "EDIF_HPC_WORKER__DEVICE": "cuda:77",
        "EDIF_HPC_FLEET__BACKOFF_SECONDS": "[0.1, 0.2]",
    }
    with stack(tmp_path, **variables) as made:
        made.up()
        submit(made, "r1")
        _, why = eventually(lambda: (told := status(made, "r1"))[0] == "ERROR" and told, 120, "the refusal")
        assert "worker.device" in why
        assert "ended within" in why
        assert len(_worker_logs(made)) == 3
        assert not workers(made)
        assert "pool resume local" in made.json("status")["notices"]["pool:local"]
        made.run("pool", "resume", "local")
        submit(made, "r2")
        eventually(lambda: len(_worker_logs(made)) > 3, 60, "another try")


def _worker_logs(made: Stack) -> list[Path]:
    return list((made.home / "logs").glob("worker-*.log"))


def test_a_killed_worker_is_replaced_when_somebody_waits(own: Stack):
    own.up()
    submit(own, "r1")
    found = eventually(lambda: workers(own), 30, "a worker")
    eventually(lambda: status(own, "r1")[0] == "ERROR", 60, "an answer")
    os.kill(next(iter(found.values())), signal.SIGKILL)
    eventually(lambda: not workers(own), 30, "the worker's end")
    submit(own, "r2")
    eventually(lambda: status(own, "r2")[0] == "ERROR", 90, "an answer from another worker")
    assert set(workers(own)) != set(found)


def test_down_drains_workers_without_a_supervisor_and_without_a_fleet(own: Stack):
    own.up()
    submit(own, "r1")
    eventually(lambda: workers(own), 30, "a worker")
    for name in ("supervisor", "fleet"):
        own.kill(name)
    own.down()
    assert own.processes() == []
