"""A request from the socket to its result, as raw clients see it."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import httpx
import pytest

from .scene import INLINE, PATIENCE, TRANSFER, Scene, Worker, frames, pattern


def unframed(frame: bytes) -> dict[str, Any]:
    """What torch.load would give, without torch."""
    with zipfile.ZipFile(io.BytesIO(frame)) as archive:
        found: dict[str, Any] = pickle.loads(archive.read("archive/data.pkl"))
    return found


def test_a_small_result_comes_in_one_binary_frame(stage: Scene, worker: Worker) -> None:
    with stage.socket() as (websocket, session):
        request_id = stage.submit(b"inline 1000", session=session)
        *before, last = frames(websocket)
    assert [frame["status"] for frame in before] == ["QUEUED", "DISPATCHED", "RUNNING"]
    assert {frame["id"] for frame in before} == {request_id}
    assert set(before[0]) == {"id", "status", "description", "data", "meta"}
    result = unframed(last)
    assert (result["id"], result["status"], result["data"]) == (request_id, "COMPLETED", pattern(1000))
    assert result["meta"]["runtime"] == 0.25


def test_a_large_result_comes_as_a_link_that_needs_no_key(stage: Scene, worker: Worker) -> None:
    with stage.socket() as (websocket, session):
        stage.submit(b"object 300000", session=session)
        last = frames(websocket)[-1]
    assert last["status"] == "COMPLETED"
    assert last["data"].startswith(stage.url + "/result/")
    answer = httpx.get(last["data"], timeout=PATIENCE)
    assert (answer.status_code, answer.content) == (200, pattern(300000))
    assert answer.headers["content-length"] == "300000"


@pytest.mark.parametrize("kind", ["inline", "object"])
def test_polling_ends_in_a_link(stage: Scene, worker: Worker, kind: str) -> None:
    request_id = stage.submit(f"{kind} 5000".encode())
    last = stage.poll(request_id)
    assert last["status"] == "COMPLETED"
    assert last["meta"]["max_mem_by_gpu"] == {"0": 1}
    assert httpx.get(last["data"], timeout=PATIENCE).content == pattern(5000)


def test_a_payload_beyond_the_inline_limit_goes_through_the_store(stage: Scene, worker: Worker) -> None:
    payload = b"inline 10\n" + bytes(3 * INLINE)
    request_id = stage.submit(payload)
    stage.poll(request_id)
    claim = next(claim for claim in worker.claims if claim.request_id == request_id)
    assert claim.payload == b""
    assert worker.store.get(claim.object_key) == payload


def test_the_worker_reads_what_it_needs_from_the_record(stage: Scene, worker: Worker) -> None:
    env = {"attn_implementation": "eager"}
    request_id = stage.submit(b"inline 10", compress=True, env=env)
    stage.poll(request_id)
    record = next(claim for claim in worker.claims if claim.request_id == request_id).record
    assert record["compress"] is True
    assert record["env"] == env
    assert record["model_key"] == worker.target
    assert record["nnsight"] == "0.8.1"


@pytest.mark.parametrize(("headers", "format"), [({}, ""), ({"edif-result-format": "planes"}, "planes")])
def test_the_format_that_a_client_asks_for_reaches_the_worker(
    stage: Scene, worker: Worker, headers: dict[str, str], format: str
) -> None:
    request_id = stage.post(b"inline 10", headers=headers).json()["id"]
    stage.poll(request_id)
    assert next(claim for claim in worker.claims if claim.request_id == request_id).record["format"] == format


@pytest.mark.parametrize("kind", ["inline", "object"])
def test_digests_are_shown_to_whoever_asks_for_them_and_to_no_stock_client(
    stage: Scene, worker: Worker, kind: str
) -> None:
    with stage.socket() as (websocket, session):
        request_id = stage.submit(f"digested {kind} 5000".encode(), session=session)
        last = frames(websocket)[-1]
    summary = stage.get(f"/api/requests/{request_id}").json()
    assert summary["transfer"] == {"bytes": 5000, **TRANSFER}
    assert httpx.get(summary["result"], timeout=PATIENCE).content == pattern(5000)
    told = unframed(last) if isinstance(last, bytes) else last
    polled = stage.get(f"/response/{request_id}").json()
    (event,) = (
        each
        for each in stage.get(f"/api/requests/{request_id}/events").json()["events"]
        if each["status"] == "COMPLETED"
    )
    for message in (told, polled, event):
        assert set(message) - {"cursor", "at"} == {"id", "status", "description", "data", "meta"}
        assert message["data"] == pattern(5000) or message["data"].startswith(f"{stage.url}/result/{request_id}?")


def test_only_a_result_with_digests_has_a_transfer(stage: Scene, worker: Worker) -> None:
    for payload in (b"inline 10", b"fail on purpose"):
        request_id = stage.submit(payload)
        stage.poll(request_id)
        assert "transfer" not in stage.get(f"/api/requests/{request_id}").json()


def test_log_lines_arrive_in_order_and_are_never_the_latest_status(stage: Scene, worker: Worker) -> None:
    with stage.socket() as (websocket, session):
        stage.submit(b"logs 200", session=session)
        *before, _ = frames(websocket)
    lines = [frame["description"] for frame in before if frame["status"] == "LOG"]
    assert lines == [f"line {number}" for number in range(200)]


def test_an_error_carries_its_text_and_what_it_cost(stage: Scene, worker: Worker) -> None:
    with stage.socket() as (websocket, session):
        request_id = stage.submit(b"fail ValueError: no", session=session)
        last = frames(websocket)[-1]
    assert (last["status"], last["description"], last["meta"]) == ("ERROR", "ValueError: no", {"runtime": 0.5})
    assert stage.poll(request_id)["description"] == "ValueError: no"


def test_one_socket_carries_several_requests(stage: Scene, worker: Worker) -> None:
    with stage.socket() as (websocket, session):
        ids = {stage.submit(b"inline 10", session=session) for _ in range(5)}
        ended = {unframed(frames(websocket)[-1])["id"] for _ in ids}
    assert ended == ids


def test_a_dropped_socket_cancels_nothing(stage: Scene, worker: Worker) -> None:
    with stage.socket() as (_, session):
        request_id = stage.submit(b"hold", session=session)
    worker.release.set()
    assert stage.poll(request_id)["status"] == "COMPLETED"


def test_an_idempotency_key_submits_once(stage: Scene, worker: Worker) -> None:
    ids = {stage.post(b"inline 10", headers={"idempotency-key": "mine"}).json()["id"] for _ in range(3)}
    assert len(ids) == 1
    with stage.socket() as (websocket, session):  # a client that lost its socket submits again
        stage.post(b"inline 10", session=session, headers={"idempotency-key": "mine"})
        assert unframed(frames(websocket, 60)[-1])["id"] in ids
    other = stage.post(b"inline 10", "bob", headers={"idempotency-key": "mine"}).json()["id"]
    assert other not in ids


def test_a_declared_time_is_what_the_worker_goes_by(stage: Scene, worker: Worker) -> None:
    request_id = stage.post(b"inline 10", headers={"edif-expected-seconds": "42.5"}).json()["id"]
    assert stage.poll(request_id)["status"] == "COMPLETED"
    (claim,) = [each for each in worker.claims if each.request_id == request_id]
    assert claim.expected_seconds == 42.5


def test_events_can_be_read_on_from_a_cursor_and_waited_for(stage: Scene, worker: Worker) -> None:
    request_id = stage.submit(b"hold")
    path = f"/api/requests/{request_id}/events"
    seen: list[dict[str, Any]] = []
    terminal = False
    while not terminal:
        after = seen[-1]["cursor"] if seen else "0-0"
        answer = stage.get(path, params={"after": after, "wait": 10}).json()
        seen += answer["events"]
        terminal = answer["terminal"]
        if seen[-1]["status"] == "RUNNING":
            worker.release.set()
    assert [event["status"] for event in seen] == ["QUEUED", "DISPATCHED", "RUNNING", "COMPLETED"]
    assert seen[-1]["data"].startswith("http://")
