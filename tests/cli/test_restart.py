"""`edif-hpc restart gateway`: a supervised gateway is replaced under clients that are at work."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from edif_hpc.core.endpoints import Role, redis_endpoint, store_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.fleet.ports import is_free
from tests.cli.stack import COMPONENTS, Stack, stack
from tests.gateway.scene import Scene, Worker, cached_model, frames
from tests.support.servers import eventually

CLIENTS = 4


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    """A service that starts no workers: the tests' own takes the requests."""
    with stack(tmp_path, EDIF_HPC_FLEET__WORKERS="0") as made:
        made.up()
        eventually(lambda: set(COMPONENTS) <= set(made.pids()), what="all components")
        cached_model(made.home / "hub")
        yield made


@pytest.fixture
def clients(own: Stack) -> Scene:
    home, settings = Home(own.home), Settings()
    redis, store = redis_endpoint(home, settings, Role.GATEWAY), store_endpoint(home, settings, Role.GATEWAY)
    key = json.loads(own.run("keys", "create", "ann", "--json").stdout)["key"]
    return Scene(home, redis, store, own.port, {"ann": key})


@pytest.fixture
def worker(clients: Scene) -> Iterator[Worker]:
    with Worker(clients.redis, clients.store) as running:
        yield running


def running(clients: Scene, request_id: str) -> None:
    eventually(lambda: clients.get(f"/response/{request_id}").json()["status"] == "RUNNING", 60.0, "RUNNING")


def states(own: Stack) -> dict[str, str]:
    return {row["name"]: row["state"] for row in own.json("ps")}


def test_a_client_at_work_gets_its_result_from_the_old_one_and_the_new_one_is_kept(
    own: Stack, clients: Scene, worker: Worker
) -> None:
    old = own.pids()["gateway"]
    with clients.socket() as (websocket, session), clients.socket() as (later, unused):
        request_id = clients.submit(b"hold", session=session)
        running(clients, request_id)
        said = own.run("restart", "gateway").stdout
        new = own.pids()["gateway"]
        assert new != old
        assert str(new) in said
        assert str(old) in said
        assert states(own)[f"gateway-{old}"] == "draining"
        clients.submit(b"inline 10", session=unused)  # through the new one, for a socket of the old one
        assert isinstance(frames(later)[-1], bytes)
        worker.release.set()
        assert isinstance(frames(websocket)[-1], bytes)
    eventually(lambda: f"gateway-{old}" not in own.pids(), 30, "the old one's end")
    assert not (own.home / "run" / f"gateway-{old}.json").exists()
    assert clients.poll(clients.submit(b"inline 10"))["status"] == "COMPLETED"
    assert own.back("gateway", own.kill("gateway")) != new
    assert "starting it again" in (own.home / "logs" / "supervisor.log").read_text()


def replaced(own: Stack) -> None:
    own.run("restart", "gateway")


def ended(own: Stack) -> None:
    own.back("gateway", own.kill("gateway", signal.SIGTERM))
    eventually(lambda: not is_free(own.port), 30, "the next one listening")


def test_who_waits_for_news_is_sent_on_when_a_gateway_goes(own: Stack, clients: Scene, worker: Worker) -> None:
    clients.keys["eve"] = json.loads(own.run("keys", "create", "eve", "--tag", "admin", "--json").stdout)["key"]
    request_id = clients.submit(b"hold")
    running(clients, request_id)
    path = f"/api/requests/{request_id}/events"
    cursor = clients.get(path).json()["events"][-1]["cursor"]
    with ThreadPoolExecutor(1) as thread:
        for going in (replaced, ended):
            waiting = thread.submit(clients.get, f"{path}?after={cursor}&wait=60")
            eventually(lambda: "edif_followed 1.0" in clients.get("/metrics", "eve").text, 30, "the poll's arrival")
            began = time.monotonic()
            going(own)
            answer = waiting.result(60)
            assert time.monotonic() - began < 30
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            assert answer.json() == {"events": [], "terminal": False}
    worker.release.set()
    assert clients.poll(request_id)["status"] == "COMPLETED"


def test_nothing_fails_while_gateways_are_replaced_again_and_again(own: Stack, clients: Scene, worker: Worker) -> None:
    """Stock-like clients: a socket, then a POST of its own, frames to the end; and pollers beside them."""
    stop, failures, answered = threading.Event(), [], []

    def blocking() -> None:
        while not stop.is_set():
            try:
                with clients.socket() as (websocket, session):
                    clients.submit(b"inline 10", session=session)
                    answered.append(isinstance(frames(websocket)[-1], bytes))
            except Exception as error:  # noqa: BLE001 - whatever a client saw is the finding
                failures.append(error)

    def polling() -> None:
        while not stop.is_set():
            try:
                answered.append(clients.poll(clients.submit(b"inline 10"))["status"] == "COMPLETED")
            except Exception as error:  # noqa: BLE001 - see above
                failures.append(error)

    threads = [threading.Thread(target=target) for target in (blocking, polling) for _ in range(CLIENTS // 2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = len(answered)
            own.run("restart", "gateway")
            eventually(lambda before=before: len(answered) > before + CLIENTS, 60, "answers by the new one")
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    assert failures == []
    assert all(answered)


def test_down_ends_a_draining_one_too(own: Stack, clients: Scene) -> None:
    with clients.socket() as (websocket, session):
        request_id = clients.submit(b"inline 10", session=session)
        own.run("restart", "gateway")
        own.down()
        last = frames(websocket)[-1]
        assert (last["status"], last["id"]) == ("ERROR", request_id)
        with pytest.raises(ConnectionClosed):
            websocket.recv(timeout=60)
    assert own.processes() == []


def test_a_new_one_that_cannot_start_leaves_the_old_one_in_its_place(own: Stack, clients: Scene) -> None:
    old = own.pids()["gateway"]
    os.chmod(own.home / "secrets" / "link-secret", 0o644)
    done = own.run("restart", "gateway", check=False)
    assert done.returncode == 1
    assert "chmod 600" in done.stderr
    assert "the old one goes on" in done.stderr
    assert own.pids()["gateway"] == old
    assert own.answers()
    assert set(states(own)) == {"supervisor", *COMPONENTS}
    os.chmod(own.home / "secrets" / "link-secret", 0o600)
    own.run("restart", "gateway")
    assert own.pids()["gateway"] != old


def test_what_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    down = Stack(tmp_path / "home")
    Home(down.home).create()
    assert "edif-hpc up" in down.run("restart", "gateway", check=False).stderr
    assert "pool drain" in down.run("restart", "worker", check=False).stderr
