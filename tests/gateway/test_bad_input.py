"""Bad input gets a clear answer, and nothing else breaks."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from .scene import KEY, MODEL, PATIENCE, PAYLOAD_LIMIT, VERSION, Scene, Worker, cached_model, frames

CLASS = KEY.class_path


def model_key(repo_id: str = MODEL, **extra: Any) -> str:
    return f"{CLASS}:" + json.dumps({"repo_id": repo_id, "revision": None, "task": "text-generation", **extra})


def refused(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    """A refusal is one sentence under `detail`."""
    assert answer.status_code == status, answer.text
    assert answer.json()["code"] == code
    detail = answer.json()["detail"]
    assert all(word in detail for word in words), detail
    assert "\n" not in detail
    assert detail.endswith((".", ")"))


def raw(stage: Scene, content: bytes, content_type: str = "multipart/form-data; boundary=XX") -> httpx.Response:
    headers = {**VERSION, **stage.headers(), "content-type": content_type}
    return httpx.post(f"{stage.url}/request", content=content, headers=headers, timeout=60.0)


PART = b'--XX\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
GOOD = json.dumps({"model_key": str(KEY)}).encode()


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "inf", "1e30"])
def test_a_time_that_is_none_is_refused(stage: Scene, seconds: str) -> None:
    answer = stage.post(b"inline 10", headers={"edif-expected-seconds": seconds})
    refused(answer, 422, "envelope", "edif-expected-seconds", "number of seconds")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not a form at all",
        b"--XX--\r\n",
        PART % (b"data", GOOD) + b"--XX--\r\n",
        PART % (b"blob", b"x") + b"--XX--\r\n",
        PART % (b"data", GOOD) + PART % (b"blob", b"") + b"--XX--\r\n",
        PART % (b"data", GOOD) + PART % (b"data", GOOD) + PART % (b"blob", b"x") + b"--XX--\r\n",
        (PART % (b"data", GOOD) + PART % (b"blob", b"x"))[:-1],
        PART % (b"data", GOOD) + PART % (b"blob", b"x" * 100000),
        PART % (b"x", b"y") * 100 + b"--XX--\r\n",
        PART % (b"data", b"[" * 100000) + PART % (b"blob", b"x") + b"--XX--\r\n",
        PART % (b"data", b"\xff\xfe") + PART % (b"blob", b"x") + b"--XX--\r\n",
        PART % (b"data", b"null") + PART % (b"blob", b"x") + b"--XX--\r\n",
    ],
)
def test_what_is_no_form_of_ours_is_422(stage: Scene, body: bytes) -> None:
    refused(raw(stage, body), 422, "envelope")


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "multipart/form-data; boundary="])
def test_another_content_type_is_422(stage: Scene, content_type: str) -> None:
    refused(raw(stage, b"{}", content_type), 422, "envelope", "multipart")


@pytest.mark.parametrize(
    ("envelope", "field"),
    [
        ({"model_key": 5}, "model_key"),
        ({"model_key": None}, "model_key"),
        ({"compress": "perhaps"}, "compress"),
        ({"env": []}, "env"),
        ({"session_id": "x" * 1000}, "session_id"),
        ({"env": {"a": "x" * 20000}}, "env"),
    ],
)
def test_a_malformed_envelope_is_422_and_names_the_field(stage: Scene, envelope: dict[str, Any], field: str) -> None:
    refused(stage.post(b"x", **envelope), 422, "envelope", field)


@pytest.mark.parametrize("asked", ["zstd", "plain", "PLANES", "planes2", "x" * 1000])
def test_a_result_format_that_there_is_not_is_422(stage: Scene, asked: str) -> None:
    answer = stage.post(b"inline 10", headers={"edif-result-format": asked})
    refused(answer, 422, "envelope", "edif-result-format", "'planes'")


@pytest.mark.parametrize("version", ["0.7.0", "0.9.0", "1.0", "nonsense"])
def test_an_unsupported_client_is_told_the_supported_range(stage: Scene, version: str) -> None:
    refused(stage.post(b"x", headers={"nnsight-version": version}), 400, "client_version", "0.8.1", "<0.9")


@pytest.mark.parametrize(
    "key",
    ["", "os.system", "os.system:{}", f"{CLASS}:", f"{CLASS}:[]", f"{CLASS}:{{}}", "nnsight.Envoy:{}",
     model_key("../../etc/passwd"), model_key("a/b/c"), model_key(revision="../x"), model_key(trust_remote_code="yes")],
)  # fmt: skip
def test_a_model_key_that_is_not_allowed_is_400(stage: Scene, key: str) -> None:
    refused(stage.post(b"x", model_key=key), 400, "model_key")


def test_a_body_over_the_limit_is_413_before_it_is_sent(stage: Scene) -> None:
    """The answer comes on the headers alone."""
    with socket.create_connection(("127.0.0.1", stage.port), timeout=60) as client:
        client.sendall(
            f"POST /request HTTP/1.1\r\nHost: x\r\nndif-api-key: {stage.keys['ann']}\r\n"
            f"Content-Length: {10**12}\r\nContent-Type: multipart/form-data; boundary=XX\r\n\r\n".encode()
        )
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"limits.payload_bytes" in answer


def test_a_stock_client_reads_the_413_although_it_sends_everything_first(stage: Scene) -> None:
    refused(stage.post(bytes(4 * PAYLOAD_LIMIT)), 413, "payload_too_large", str(PAYLOAD_LIMIT))


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(stage: Scene) -> None:
    def chunks() -> Any:
        yield PART % (b"data", GOOD) + b'--XX\r\nContent-Disposition: form-data; name="blob"\r\n\r\n'
        for _ in range(4 * PAYLOAD_LIMIT // 65536):
            yield bytes(65536)

    headers = {**VERSION, **stage.headers(), "content-type": "multipart/form-data; boundary=XX"}
    refused(
        httpx.post(f"{stage.url}/request", content=chunks(), headers=headers, timeout=PATIENCE),
        413,
        "payload_too_large",
    )
    assert not list(stage.home.spool.iterdir())


def test_an_early_refusal_is_read_by_a_client_that_sends_a_lot(stage: Scene) -> None:
    headers = {"nnsight-version": "0.1"}
    refused(stage.post(bytes(PAYLOAD_LIMIT - 10_000), headers=headers), 400, "client_version")


@pytest.mark.parametrize(
    ("key", "env", "words"),
    [
        (model_key("edif-test/absent"), {}, ["edif-test/absent", "cache", "models pull"]),
        (model_key(revision="other"), {}, ["other"]),
        (model_key(trust_remote_code=True), {}, ["trust_remote_code"]),
        (model_key(), {"peft": "a/b"}, ["a/b", "models.adapters"]),
        (model_key(), {"peft": 5}, ["models.adapters"]),
    ],
)
def test_a_model_that_cannot_be_used_ends_in_error_at_once(
    stage: Scene, key: str, env: dict[str, Any], words: list[str]
) -> None:
    with stage.socket() as (websocket, session):
        request_id = stage.submit(b"x", session=session, model_key=key, env=env)
        seen = frames(websocket)
    assert [frame["status"] for frame in seen] == ["RECEIVED", "ERROR"]
    polled = stage.poll(request_id)
    assert polled["description"] == seen[-1]["description"]
    assert all(word in polled["description"] for word in words), polled
    assert "\n" not in polled["description"]


def test_a_model_pulled_a_moment_ago_is_found(stage: Scene, worker: Worker) -> None:
    key = model_key("edif-test/new")
    assert stage.poll(stage.submit(b"x", model_key=key))["status"] == "ERROR"
    cached_model(stage.home.hub, "edif-test/new")
    request_id = stage.submit(b"x", model_key=key)
    assert stage.get(f"/response/{request_id}").json()["status"] == "QUEUED"
    assert stage.cancel(request_id) == "ended"


def test_ids_users_and_times_that_clients_send_are_ignored(stage: Scene, worker: Worker) -> None:
    claims = {"id": "mine", "user": "bob", "email": "bob", "received": "1999", "priority": 9}
    data = json.dumps({"model_key": str(KEY), **claims}).encode()
    request_id = raw(stage, PART % (b"data", data) + PART % (b"blob", b"inline 1\n") + b"--XX--\r\n").json()["id"]
    assert request_id != "mine"
    assert stage.poll(request_id)["status"] == "COMPLETED"
    listed = stage.get(f"/api/requests/{request_id}").json()
    assert listed["user"] == "ann"
    assert listed["submitted"] > time.time() - 60


@pytest.mark.parametrize("path", ["/nothing", "/api", "/request/x", "/docs", "/openapi.json"])
def test_what_is_not_there_is_404(stage: Scene, path: str) -> None:
    refused(stage.get(path), 404, "not_found")


@pytest.mark.parametrize(
    "query", ["after=x", "after=1-x", "after=%C2%B2-0", "wait=x", "wait=-1", "wait=nan", "wait=inf"]
)
def test_a_wrong_cursor_or_wait_is_422(stage: Scene, query: str) -> None:
    request_id = stage.submit(b"x", model_key=model_key("edif-test/absent"))
    refused(stage.get(f"/api/requests/{request_id}/events?{query}"), 422, "envelope")


def test_the_gateway_is_none_the_worse(stage: Scene, worker: Worker) -> None:
    assert stage.poll(stage.submit(b"inline 1"))["status"] == "COMPLETED"
    assert "unexpected" not in stage.log()
    assert "Traceback" not in stage.log()
