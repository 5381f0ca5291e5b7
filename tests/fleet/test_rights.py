"""What workers and the gateway may do in the embedded Redis and store, and what a worker must be able to do."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from edif_hpc import __version__
from edif_hpc.core.endpoints import Role, redis_endpoint, store_endpoint
from edif_hpc.core.queue import Events, Queue, Release, Step, Submission, keys, rights
from edif_hpc.core.registry import Registry, WorkerRecord
from edif_hpc.core.settings import LimitSettings
from edif_hpc.core.store import Store, payload_key, result_key
from edif_hpc.core.tally import Tally
from edif_hpc.core.wire import Status
from tests.support.stack import Stack

from .reaching import in_redis, of

pytestmark = pytest.mark.xdist_group("network")
NO = r"(?i)no permissions?|not allowed"
"""Later versions of Redis refuse DEBUG before they look at rights."""


@pytest.mark.parametrize("command", [
    ("HGETALL", keys.API_KEYS), ("HSET", keys.API_KEYS, "a", "b"), ("GET", keys.session("s")), ("GET", "elsewhere"),
    ("SET", keys.FLEET_LEADER, "me"), ("HSET", keys.POOLS, "p", "stopped"), ("KEYS", "*"), ("SCAN", "0"),
    ("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", "1"), ("ACL", "LIST"), ("ACL", "WHOAMI"), ("FLUSHALL",),
    ("FLUSHDB",), ("DEBUG", "SLEEP", "0"), ("SHUTDOWN",), ("INFO",), ("MONITOR",), ("CLIENT", "LIST"),
    ("SCRIPT", "FLUSH"), ("EVAL", "return 1", "0"), ("REPLICAOF", "h", "1"), ("BGREWRITEAOF",), ("SAVE",),
    ("MODULE", "LIST"), ("SELECT", "1"), ("PUBLISH", "elsewhere", "x"), ("SUBSCRIBE", "elsewhere"),
    ("PSUBSCRIBE", "*"), ("RENAME", keys.API_KEYS, keys.request("r")), ("DUMP", keys.API_KEYS),
])  # fmt: skip
def test_a_worker_is_refused_what_is_not_its_own(reached: Stack, command: tuple[str, ...]) -> None:
    with pytest.raises((NoPermissionError, ResponseError), match=NO):
        in_redis(reached, Role.WORKER, lambda redis: redis.execute_command(*command))


def test_a_worker_is_refused_it_inside_a_script_too(reached: Stack) -> None:
    script = f"return redis.call('HGETALL', '{keys.API_KEYS}')"

    async def run(redis: Redis) -> Any:
        client: Any = redis
        return await client.evalsha(await client.script_load(script), 0)

    with pytest.raises(ResponseError, match=r"(?i)permission|can't access"):
        in_redis(reached, Role.WORKER, run)


@pytest.mark.parametrize("command", [("CONFIG", "GET", "*"), ("FLUSHALL",), ("ACL", "LIST"), ("DEBUG", "SLEEP", "0")])
def test_the_gateway_cannot_change_redis_either(reached: Stack, command: tuple[str, ...]) -> None:
    with pytest.raises((NoPermissionError, ResponseError), match=NO):
        in_redis(reached, Role.GATEWAY, lambda redis: redis.execute_command(*command))


def test_the_passwords_are_not_each_others(reached: Stack) -> None:
    theirs = of(reached, redis_endpoint, Role.WORKER).password
    with pytest.raises(AuthenticationError):
        in_redis(reached, Role.GATEWAY, lambda redis: redis.ping(), password=theirs)


def test_every_command_of_a_workers_scripts_is_granted() -> None:
    folder = files("edif_hpc.core.queue") / "lua"
    for name in ("claim", "event", "note", "renew", "finish", "release", "withdraw", "common"):
        text = (folder / f"{name}.lua").read_text()
        calls = re.findall(r"redis\.p?call\((.*?)[,)]", text)
        called = {word.lower() for call in calls for word in re.findall(r"'([A-Z]+)'", call)}
        assert called <= set(rights.SCRIPTED), name


def test_a_worker_can_do_all_its_work(reached: Stack) -> None:
    """Each transition of a request's life, as the worker's user, at the address."""
    target, limits = "test:rights", LimitSettings()

    async def submit(redis: Redis) -> None:
        for number in range(4):
            await Queue(redis, limits).submit(Submission(f"rights-{number}", "ada", target, "trace", {}, b"payload"))

    async def work(redis: Redis) -> None:
        queue, registry = Queue(redis, limits), Registry(redis)
        record = WorkerRecord(worker_id="rights", version=__version__, host="h", pid=1, started=0.0)
        await registry.announce(record, 5.0)
        assert "rights" in {found.worker_id for found in await registry.workers()}
        assert (await queue.waiting())[target] == 4
        waiting = await queue.waiting_for(target)
        assert await queue.note(waiting, Status.DEPLOYING, "Soon.") == 4
        for reason in (Release.HANDBACK, Release.LOSS, Release.WALLTIME):
            claim = await queue.claim("rights", [target], 5.0)
            assert claim is not None
            assert await queue.release(claim, reason, "a reason") == "queued"
        claim = await queue.claim("rights", [target], 5.0)
        assert claim is not None
        assert claim.payload == b"payload"
        await queue.event(claim, Step(1, Status.RUNNING), Step(2, Status.LOG, "a line"))
        assert [verdict.value for verdict in await queue.renew([claim], 5.0)] == ["ok"]
        await queue.expire_object("results/none", 1.0)
        await queue.finish(claim, Status.COMPLETED, data={"inline": True}, run_seconds=0.1, result=b"result")
        claim = await queue.claim("rights", [target], 5.0)
        assert claim is not None
        await queue.finish(claim, Status.ERROR, "Its own fault.", object_key="results/none")
        for request_id in await queue.waiting_for(target):
            assert await queue.withdraw(request_id, "", "No longer.", only_waiting=True) == "ended"
        assert await registry.commands("rights") == []
        tally = Tally()
        tally.count("sbatch")
        await tally.write(redis)
        await registry.remember_environment({"python": "3"})
        async for channel, _ in Events(redis).listen(keys.BELL_QUEUE, keys.BELL_WORKERS):
            assert channel == keys.BELL_QUEUE
            break
        await registry.leave("rights")

    in_redis(reached, Role.GATEWAY, submit)
    in_redis(reached, Role.WORKER, work)


def test_a_worker_reads_payloads_and_writes_results_alone(reached: Stack, tmp_path: Path) -> None:
    gateway, worker = (Store(of(reached, store_endpoint, role)) for role in (Role.GATEWAY, Role.WORKER))
    payload, result = payload_key("a"), result_key("a", 1, "token")
    gateway.put(payload, b"payload")
    assert worker.get(payload) == b"payload"
    large = tmp_path / "large"
    large.write_bytes(bytes(40_000_000))
    with large.open("rb") as file:
        worker.upload(result, file)
    assert gateway.get(result) == bytes(40_000_000)
    for refused in (
        lambda: worker.get(result),
        lambda: worker.put(payload, b"x"),
        lambda: worker.put("elsewhere", b"x"),
        lambda: worker.client.delete_object(Bucket="edif-hpc", Key=payload),
        lambda: worker.client.list_objects_v2(Bucket="edif-hpc"),
        lambda: worker.client.create_bucket(Bucket="other"),
        lambda: worker.client.delete_bucket(Bucket="edif-hpc"),
    ):
        with pytest.raises(Exception, match="AccessDenied"):
            refused()
    gateway.delete([payload, result])
