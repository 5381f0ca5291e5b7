"""Redis and the gateway itself go away in the middle; whoever waits gets the end all the same."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from edif_hpc.core.endpoints import StoreEndpoint
from edif_hpc.core.queue import Queue, keys
from edif_hpc.core.settings import LimitSettings
from tests.support.servers import RedisProcess, eventually, s3_server

from .scene import INLINE, LEASE, Scene, Worker, frames, scene


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreEndpoint]:
    with s3_server(tmp_path_factory.mktemp("store")) as found:
        yield found


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"), persistent=True)
    process.start()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, redis: RedisProcess, store: StoreEndpoint) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("faults") / "home", redis.endpoint, store) as found:
        yield found


@pytest.fixture
def worker(faulty: Scene) -> Iterator[Worker]:
    with Worker(faulty.redis, faulty.store) as running:
        yield running


def running(stage: Scene, request_id: str) -> None:
    eventually(lambda: stage.get(f"/response/{request_id}").json()["status"] == "RUNNING", 60.0, "RUNNING")


def test_sockets_outlive_redis(faulty: Scene, redis: RedisProcess, worker: Worker) -> None:
    with faulty.socket() as (websocket, session), faulty.socket() as (idle, later):
        request_id = faulty.submit(b"hold", session=session)
        running(faulty, request_id)
        redis.kill()
        answer = faulty.get(f"/response/{request_id}")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "Redis" in answer.json()["detail"]
        assert faulty.post(b"inline 10").status_code == 503
        redis.start()
        eventually(lambda: faulty.get(f"/response/{request_id}").status_code == 200, 60.0, "the gateway's recovery")
        worker.release.set()
        assert isinstance(frames(websocket, 60)[-1], bytes)
        faulty.submit(b"inline 10", session=later)
        assert isinstance(frames(idle, 60)[-1], bytes)


def test_a_redis_that_stands_still_is_503_and_comes_back(faulty: Scene, redis: RedisProcess, worker: Worker) -> None:
    with faulty.socket() as (websocket, session):
        request_id = faulty.submit(b"hold", session=session)
        running(faulty, request_id)
        assert redis.process is not None
        redis.process.send_signal(signal.SIGSTOP)
        try:
            assert faulty.get(f"/response/{request_id}").status_code == 503
            assert httpx.get(f"{faulty.url}/ping", timeout=10).status_code == 200
        finally:
            redis.process.send_signal(signal.SIGCONT)
        worker.release.set()
        assert isinstance(frames(websocket, 60)[-1], bytes)


def test_a_poll_goes_on_over_a_gateway_restart(faulty: Scene, worker: Worker) -> None:
    request_id = faulty.submit(b"hold")
    running(faulty, request_id)
    faulty.process.kill()
    faulty.process.wait()
    worker.release.set()
    faulty.start()
    assert faulty.poll(request_id)["status"] == "COMPLETED"


def test_a_gateway_that_ends_says_error_to_who_waits(faulty: Scene, worker: Worker) -> None:
    with faulty.socket() as (websocket, session), faulty.socket() as (idle, _):
        request_id = faulty.submit(b"hold", session=session)
        running(faulty, request_id)
        faulty.process.send_signal(signal.SIGTERM)
        last = frames(websocket)[-1]
        assert (last["status"], last["id"]) == ("ERROR", request_id)
        assert request_id in last["description"]
        with pytest.raises(ConnectionClosed):
            idle.recv(timeout=60)
    assert faulty.process.wait(60) == 0
    faulty.start()
    worker.release.set()
    assert faulty.poll(request_id)["status"] == "COMPLETED"


def test_a_successor_takes_the_port_while_the_old_one_serves_its_sockets(faulty: Scene, worker: Worker) -> None:
    old = faulty.process
    assert old is not None
    with faulty.socket() as (websocket, session), faulty.socket() as (idle, unused):
        request_id = faulty.submit(b"hold", session=session)
        running(faulty, request_id)
        with pytest.raises(subprocess.TimeoutExpired):
            faulty.start("--takeover", wait=False).wait(2)
        old.send_signal(signal.SIGHUP)
        eventually(lambda: '"draining"' in faulty.log(), 60.0, "the old gateway draining")
        for _ in range(20):
            assert faulty.answers()
        other = faulty.submit(b"inline 10", session=unused)
        seen = frames(idle)
        assert isinstance(seen[-1], bytes)
        assert seen[0]["id"] == other
        worker.release.set()
        assert isinstance(frames(websocket)[-1], bytes)
        assert old.poll() is None
    assert old.wait(60) == 0
    assert faulty.answers()


def test_a_port_that_is_taken_is_refused_in_one_sentence(faulty: Scene) -> None:
    mine = faulty.process
    second = faulty.start(wait=False)
    try:
        assert second.wait(60) == 1
        assert f"cannot listen on 127.0.0.1:{faulty.port}" in faulty.log()
    finally:
        faulty.process = mine


def test_redis_that_lost_its_data_ends_what_waits(faulty: Scene) -> None:
    with faulty.socket() as (websocket, session):
        faulty.submit(b"hold", session=session)
        assert json.loads(websocket.recv(timeout=60))["status"] == "QUEUED"
        users = faulty.run(lambda found: found.hgetall(keys.API_KEYS))
        faulty.run(lambda found: found.flushall())
        faulty.run(lambda found: found.hset(keys.API_KEYS, mapping=users))
        last = frames(websocket, 60)[-1]
    assert last["status"] == "ERROR"
    assert "lost" in last["description"]


def test_a_full_redis_is_503(faulty: Scene, worker: Worker) -> None:
    faulty.run(lambda found: found.config_set("maxmemory", 1))
    try:
        answer = faulty.post(b"inline 10")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    finally:
        faulty.run(lambda found: found.config_set("maxmemory", 0))
    assert faulty.poll(faulty.submit(b"inline 10"))["status"] == "COMPLETED"


def test_nothing_is_lost_between_many_sockets(faulty: Scene, worker: Worker) -> None:
    """Every socket gets its own end, while Redis drops all connections again and again."""
    ended: list[bytes] = []
    stop = threading.Event()

    def client() -> None:
        answered = 0
        while answered < 5:
            try:
                with faulty.socket() as (websocket, session):
                    while faulty.post(b"inline 10", session=session).status_code == 503:
                        time.sleep(0.05)
                    ended.append(frames(websocket, 60)[-1])
                    answered += 1
            except InvalidStatus as refused:  # cut off while the key was looked up: nothing was accepted yet
                if refused.response.status_code != 503:
                    raise

    def cutter() -> None:
        while not stop.wait(0.5):
            for kind in ("normal", "pubsub"):
                faulty.run(lambda found, kind=kind: found.execute_command("CLIENT", "KILL", "TYPE", kind))
            # As the fleet does: a claim whose answer was cut off comes back when its lease has ended.
            faulty.run(lambda found: Queue(found, LimitSettings()).sweep(LEASE, 1.0))

    clients = [threading.Thread(target=client) for _ in range(8)]
    cutting = threading.Thread(target=cutter)
    for thread in (*clients, cutting):
        thread.start()
    for thread in clients:
        thread.join(120)
    stop.set()
    cutting.join()
    assert len(ended) == 40
    assert all(isinstance(frame, bytes) for frame in ended)


def test_a_store_that_is_away_refuses_large_payloads_only(
    tmp_path_factory: pytest.TempPathFactory, redis: RedisProcess, faulty: Scene, worker: Worker
) -> None:
    away = StoreEndpoint("http://127.0.0.1:9", "us-east-1", "edif-hpc", "a", "s")
    with scene(tmp_path_factory.mktemp("storeless") / "home", redis.endpoint, away) as storeless:
        answer = storeless.post(bytes(2 * INLINE))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "store" in answer.json()["detail"]
        assert storeless.poll(storeless.submit(b"inline 10"))["status"] == "COMPLETED"
