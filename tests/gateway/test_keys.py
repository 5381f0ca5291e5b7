"""Who gets in, and that nobody sees what is another's."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import httpx
import pytest
from redis.asyncio import Redis
from starlette.requests import Request
from websockets.exceptions import InvalidStatus

from edif_hpc.core.apikeys import ApiKeys, hashed
from edif_hpc.core.errors import KeyRequired
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.queue import keys
from edif_hpc.core.registry import Registry, WorkerRecord
from edif_hpc.gateway import peer
from edif_hpc.gateway.auth import Auth
from edif_hpc.gateway.observed import Observed
from tests.support.servers import eventually

from .scene import Scene, Worker, frames

CLOSED = ["/response/x", "/metrics", "/api/requests", "/api/requests/x", "/api/requests/x/events", "/api/workers",
          "/api/models"]  # fmt: skip
PASSED_ON = ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host", "CF-Connecting-IP"]


@pytest.mark.parametrize("path", CLOSED)
def test_what_is_a_users_needs_a_key(stage: Scene, path: str) -> None:
    answer = stage.get(path, "", headers={"ndif-api-key": "edif_wrong"})
    assert answer.status_code == 401
    assert "edif-hpc keys create" in answer.json()["detail"]


def test_a_request_and_a_socket_need_a_key(stage: Scene) -> None:
    assert stage.post(b"x", "", headers={"ndif-api-key": "edif_wrong"}).status_code == 401
    with pytest.raises(InvalidStatus) as refusal, stage.socket("", **{"ndif-api-key": "x" * 2000}):
        pass
    assert refusal.value.response.status_code == 401
    assert b"edif-hpc keys create" in (refusal.value.response.body or b"")


@pytest.mark.parametrize("path", ["/ping", "/status", "/env", "/whoami"])
def test_what_the_stock_client_asks_without_a_key_is_open(stage: Scene, path: str) -> None:
    assert stage.get(path, "", headers={"ndif-api-key": "edif_wrong"}).status_code == 200


def test_whoami_knows_keys_and_forgives_unknown_ones(stage: Scene) -> None:
    assert stage.get("/whoami").json() == {"email": "ann", "tags": []}
    assert stage.get("/whoami", "root").json() == {"email": "root", "tags": ["admin"]}
    unknown = stage.get("/whoami", "", headers={"ndif-api-key": "edif_wrong"}).json()
    assert unknown == {"email": None, "tags": []}


def test_a_revoked_key_stops_working_within_seconds(stage: Scene) -> None:
    key = stage.add_user("eve")
    assert stage.get("/api/requests", "eve").status_code == 200

    async def revoke(redis: Redis) -> None:
        await ApiKeys(redis).revoke(hashed(key)[:12])

    stage.run(revoke)
    eventually(lambda: stage.get("/api/requests", "eve").status_code == 401, 60.0, "the key being refused")


def test_nobody_sees_anothers_requests(stage: Scene, worker: Worker) -> None:
    request_id = stage.submit(b"hold")
    for path in (f"/api/requests/{request_id}", f"/api/requests/{request_id}/events"):
        assert stage.get(path, "bob").status_code == 404
        assert stage.get(path, "root").status_code == 200
    polled = stage.get(f"/response/{request_id}", "bob").json()
    assert polled["status"] == "ERROR"
    assert "no such request of yours" in polled["description"]
    assert stage.cancel(request_id, "bob") is None
    assert request_id not in stage.get("/api/requests", "bob").text
    assert stage.get("/api/requests?user=ann", "bob").status_code == 403
    assert request_id in stage.get("/api/requests?user=ann", "root").text
    assert stage.cancel(request_id, "ann") == "told"


def test_an_id_that_never_was_ends_a_poll(stage: Scene) -> None:
    answer = stage.get("/response/0123456789abcdef")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ERROR"


def test_a_session_counts_only_from_the_key_that_opened_it(stage: Scene, worker: Worker) -> None:
    with stage.socket("ann") as (websocket, session):
        foreign = stage.submit(b"inline 10", "bob", session)
        own = stage.submit(b"inline 10", "ann", session)
        seen = frames(websocket)
        assert {frame["id"] for frame in seen[:-1]} == {own}
        with pytest.raises(TimeoutError):
            websocket.recv(timeout=0.5)
    assert stage.poll(foreign, "bob")["status"] == "COMPLETED"


def test_a_made_up_session_is_no_error(stage: Scene, worker: Worker) -> None:
    assert stage.poll(stage.submit(b"inline 10", session="f" * 32))["status"] == "COMPLETED"


def test_a_closed_socket_leaves_no_session_in_redis(stage: Scene) -> None:
    with stage.socket() as (_, session):
        eventually(lambda: stage.run(lambda redis: redis.exists(keys.session(session))), 60.0, "the session")
    eventually(lambda: not stage.run(lambda redis: redis.exists(keys.session(session))), 60.0, "its end")


def test_metrics_are_for_admins_and_keys_tagged_so(stage: Scene, worker: Worker) -> None:
    stage.poll(stage.submit(b"inline 10"))
    stage.add_user("prometheus", "metrics")
    assert stage.get("/metrics", "ann").status_code == 403
    text = stage.get("/metrics", "prometheus").text
    assert 'edif_http_answers_total{route="/request",status="200"}' in text
    assert 'edif_http_seconds_bucket{le="+Inf",route="/response/{request_id}"}' in text
    assert 'edif_queue_events_total{event="requests_completed"}' in text
    assert "edif_doorbell_connected 1.0" in text


# -- the owner --------------------------------------------------------------------------------------------------------


def authority(required: Isolation, stage: Scene, redis: Redis, uid: int | None = None) -> Auth:
    registry = Registry(redis)
    return Auth(ApiKeys(redis), Observed(registry, required), trust_owner=True, owner_uid=uid)


def asked(client: tuple[str, int], server: tuple[str, int], **headers: str) -> Request:
    """A request as the server hands it over."""
    raw = [(name.lower().encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
    return Request({"type": "http", "client": client, "server": server, "headers": raw, "path": "/", "method": "GET"})


@pytest.fixture
def connection() -> tuple[tuple[str, int], tuple[str, int]]:
    """Both ends of a loopback connection of this process, which stays open while the test runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            yield near.getsockname(), far.getsockname()


def test_the_owner_needs_no_key_where_code_is_locked_in(stage: Scene) -> None:
    assert stage.get("/api/requests", "").status_code == 200
    assert stage.get("/whoami", "").json()["email"] == "owner"


@pytest.mark.parametrize("header", PASSED_ON)
def test_what_was_passed_on_is_not_the_owners(stage: Scene, header: str) -> None:
    assert stage.get("/api/requests", "", headers={header: "127.0.0.1"}).status_code == 401


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}])
def test_a_browser_led_here_by_another_page_is_not_the_owner(stage: Scene, headers: dict[str, str]) -> None:
    assert stage.get("/api/requests", "", headers=headers).status_code == 401


def test_the_stock_clients_websocket_library_names_the_server_as_origin(stage: Scene) -> None:
    with stage.socket("", Origin=stage.url) as (_, session):
        assert session


def test_another_uid_on_loopback_needs_a_key(stage: Scene, connection: tuple) -> None:
    async def go(redis: Redis) -> None:
        with pytest.raises(KeyRequired):
            await authority(Isolation.LOCKED, stage, redis, os.geteuid() + 1).user(asked(*connection))
        assert (await authority(Isolation.LOCKED, stage, redis).user(asked(*connection))).name == "owner"
        with pytest.raises(KeyRequired):
            await authority(Isolation.LOCKED, stage, redis).user(asked(("192.0.2.1", 5), connection[1]))

    stage.run(go)


def test_below_locked_the_owner_needs_a_key_beside_other_users(stage: Scene, connection: tuple) -> None:
    async def go(redis: Redis) -> None:
        weak = WorkerRecord(
            worker_id="w", version="1", host="h", pid=1, started=time.time(), state="serving",
            isolation=Isolation.PROCESS,
        )  # fmt: skip
        await Registry(redis).announce(weak, 30)
        try:
            with pytest.raises(KeyRequired, match="owner-key"):
                await authority(Isolation.NONE, stage, redis).user(asked(*connection))
            assert (await authority(Isolation.LOCKED, stage, redis).user(asked(*connection))).name == "owner"
        finally:
            await Registry(redis).leave("w")
            await asyncio.sleep(0)

    stage.run(go)


@pytest.mark.parametrize(
    ("listener_family", "bound", "client_family", "called"),
    [
        (socket.AF_INET, "127.0.0.1", socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET6, "::1", socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::", socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "127.0.0.1", socket.AF_INET6, "::ffff:127.0.0.1"),
    ],
)
def test_both_ways_of_asking_the_kernel_agree(
    listener_family: int, bound: str, client_family: int, called: str
) -> None:
    with socket.socket(listener_family) as listener, socket.socket(client_family) as client:
        if bound == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((bound, 0))
        listener.listen()
        client.connect((called, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            ends = accepted.getpeername()[:2], accepted.getsockname()[:2]
            assert peer.uid_by_netlink(*ends) == os.geteuid()
            assert peer.uid_by_table(*ends) == os.geteuid()
            assert peer.is_loopback(ends[0][0])
            client.close()
            eventually(lambda: peer.uid_by_netlink(*ends) is None, 60.0, "the socket's end")
            assert peer.uid_by_table(*ends) is None


def test_an_http_client_by_hand_gets_a_sentence(stage: Scene) -> None:
    answer = httpx.get(f"{stage.url}/api/requests", headers={"ndif-api-key": ""}, timeout=60)
    assert answer.status_code == 200  # an empty key is none, and this uid is the owner's
