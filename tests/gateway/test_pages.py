"""What the stock client and the command line read about the service."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.queue import keys
from edif_hpc.core.registry import ModelRecord, Registry, WorkerRecord
from edif_hpc.core.tally import Tally
from tests.support.servers import eventually

from .scene import KEY, MODEL, Scene

RECORD = WorkerRecord(
    worker_id="w-secret", version="1", host="node17", pid=77, started=time.time(), state="serving",
    isolation=Isolation.LOCKED, models=[ModelRecord(model_key=str(KEY), state="ready", memory_bytes=5)],
    memory_budget=1 << 40,
)  # fmt: skip


@pytest.fixture
def serving(stage: Scene) -> Iterator[None]:
    async def announce(redis: Redis) -> None:
        await Registry(redis).announce(RECORD, 60)

    async def leave(redis: Redis) -> None:
        await Registry(redis).leave(RECORD.worker_id)

    stage.run(announce)
    eventually(lambda: "w-secret" in stage.get("/api/workers").text, 60.0, "the worker")
    yield
    stage.run(leave)
    eventually(lambda: "w-secret" not in stage.get("/api/workers").text, 60.0, "its end")


def test_ping(stage: Scene) -> None:
    assert stage.get("/ping", "").json() == "pong"


def test_a_model_in_the_cache_is_cold(stage: Scene) -> None:
    deployments = stage.get("/status", "").json()["deployments"]
    assert deployments[MODEL]["deployment_level"] == "COLD"
    assert deployments[MODEL]["application_state"] == "NOT_STARTED"


def test_a_model_on_a_worker_is_hot_and_no_machine_is_named(stage: Scene, serving: None) -> None:
    answer = stage.get("/status", "")
    (hot,) = [entry for entry in answer.json()["deployments"].values() if entry["deployment_level"] == "HOT"]
    assert hot == {
        "deployment_level": "HOT", "application_state": "RUNNING", "model_key": str(KEY), "repo_id": MODEL,
        "task": "text-generation", "trust_remote_code": False, "revision": "main",
    }  # fmt: skip
    assert "w-secret" not in answer.text
    assert "node17" not in answer.text


def test_env_is_the_last_workers_and_before_any_the_gateways_own(stage: Scene) -> None:
    own = stage.get("/env", "").json()
    assert own["python_version"] == sys.version
    assert own["packages"]["redis"]
    environment = {"python_version": "3.99", "packages": {"torch": "9.9"}}

    async def remember(redis: Redis) -> None:
        await Registry(redis).remember_environment(environment)

    stage.run(remember)
    try:
        assert stage.get("/env", "").json() == environment
    finally:
        stage.run(lambda redis: redis.delete(keys.ENVIRONMENT))


def test_workers_and_models_for_the_command_line(stage: Scene, serving: None) -> None:
    (seen,) = stage.get("/api/workers").json()["workers"]
    assert seen["models"][0]["state"] == "ready"
    assert "pid" not in seen
    assert stage.get("/api/workers", "root").json()["workers"][0]["pid"] == 77
    (model,) = [row for row in stage.get("/api/models").json()["models"] if row["repo_id"] == MODEL]
    assert model["workers"] == [{"worker": "w-secret", "state": "ready", "running": 0, "error": ""}]
    assert model["memory_bytes"] > 0


def test_how_often_slurm_was_asked_is_told_by_kind(stage: Scene) -> None:
    tally = Tally()
    for command in ("squeue", "squeue", "sbatch"):
        tally.count(command)
    stage.run(tally.write)
    told = stage.get("/api/workers").json()["slurm_commands"]
    assert told["total"] == {"sbatch": 1, "squeue": 2}
    assert Counter(told["last_hour"]) + Counter(told["this_hour"]) == told["total"]
    text = stage.get("/metrics", "root").text
    assert 'edif_slurm_commands_total{command="squeue"} 2.0' in text
    assert 'edif_slurm_commands_total{command="sbatch"} 1.0' in text


def test_own_requests_newest_first(stage: Scene) -> None:
    ids = [stage.submit(b"x", model_key=str(KEY).replace(MODEL, "edif-test/absent")) for _ in range(3)]
    listed = stage.get("/api/requests?limit=2").json()["requests"]
    assert {row["id"] for row in listed} <= set(ids)
    assert [row["status"] for row in listed] == ["ERROR", "ERROR"]
    assert listed[0]["submitted"] >= listed[1]["submitted"]
