"""Downloads: whole, by range, many at once, and links that are refused."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from edif_hpc.core import links
from edif_hpc.core.queue import keys

from .scene import PATIENCE, Scene, Worker, frames, pattern

SIZE = 100_000
MIB = 1024 * 1024


@pytest.fixture(params=["inline", "object"])
def link(request: pytest.FixtureRequest, stage: Scene, worker: Worker) -> str:
    return str(stage.poll(stage.submit(f"{request.param} {SIZE}".encode()))["data"])


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=100-", 100, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        ("bytes=5-99999999", 5, SIZE),
        (f"bytes=-{2 * SIZE}", 0, SIZE),
        (f"bytes={SIZE - 1}-{SIZE - 1}", SIZE - 1, SIZE),
    ],
)
def test_a_range_is_answered_with_206(link: str, asked: str, first: int, end: int) -> None:
    answer = httpx.get(link, headers={"range": asked}, timeout=PATIENCE)
    assert (answer.status_code, answer.content) == (206, pattern(SIZE)[first:end])
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - first)


@pytest.mark.parametrize("asked", ["", "bytes=", "bytes=-", "bytes=9-3", "bytes=1-2,5-6", "lines=1-2", "bytes=a-b"])
def test_what_is_no_single_range_gets_everything(link: str, asked: str) -> None:
    answer = httpx.get(link, headers={"range": asked}, timeout=PATIENCE)
    assert (answer.status_code, answer.content) == (200, pattern(SIZE))
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=-0", f"bytes={SIZE + 5}-{SIZE + 9}"])
def test_a_range_beyond_the_end_is_416(link: str, asked: str) -> None:
    answer = httpx.get(link, headers={"range": asked}, timeout=PATIENCE)
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")


def test_a_download_goes_on_only_if_the_result_is_the_same(link: str) -> None:
    tag = httpx.head(link, timeout=PATIENCE).headers["etag"]
    assert httpx.get(link, headers={"range": "bytes=1-2", "if-range": tag}, timeout=PATIENCE).status_code == 206
    assert httpx.get(link, headers={"range": "bytes=1-2", "if-range": '"other"'}, timeout=PATIENCE).status_code == 200


def test_head_tells_the_size_and_sends_nothing(link: str) -> None:
    answer = httpx.head(link, timeout=PATIENCE)
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(SIZE), b"")


def test_a_link_is_bound_to_its_request_and_its_time(link: str, stage: Scene) -> None:
    path = urlsplit(link).path
    expires = int(re.search(r"expires=(\d+)", link).group(1))
    secret = stage.home.secret("link-secret")
    request_id = path.rsplit("/", 1)[1]
    expired = links.make(secret, stage.url, request_id, -5)
    tampered = [
        link.replace(str(expires), str(expires + 1)),
        link[:-1] + ("0" if link[-1] != "0" else "1"),
        link.replace(request_id, "f" * 32),
        stage.url + path,
        f"{stage.url}{path}?expires=9e9&signature=%C3%A9",
        f"{stage.url}{path}?expires={'9' * 400}&signature=x",
        expired,
    ]
    for wrong in tampered:
        answer = httpx.get(wrong, timeout=PATIENCE)
        assert answer.status_code == 403, wrong
        assert "fresh one" in answer.json()["detail"]
    assert httpx.get(link, timeout=PATIENCE).status_code == 200


def test_a_result_that_has_expired_is_a_sentence(stage: Scene, worker: Worker) -> None:
    request_id = stage.submit(b"inline 10")
    link = stage.poll(request_id)["data"]
    stage.run(lambda redis: redis.delete(keys.result(request_id)))
    answer = httpx.get(link, timeout=PATIENCE)
    assert answer.status_code == 404
    assert "expired" in answer.json()["detail"]


def test_an_object_that_is_gone_from_the_store_is_not_a_traceback(stage: Scene, worker: Worker) -> None:
    request_id = stage.submit(b"object 10000")
    link = stage.poll(request_id)["data"]
    data = stage.get(f"/api/requests/{request_id}").json()
    assert data["result_bytes"] == 10000
    claim = next(claim for claim in worker.claims if claim.request_id == request_id)
    worker.store.delete([f"results/{request_id}/{claim.attempt}-{claim.token[:16]}"])
    answer = httpx.get(link, timeout=PATIENCE)
    assert answer.status_code in (404, 503), answer.text
    assert "detail" in answer.json()


@pytest.mark.parametrize(
    ("headers", "begins"),
    [
        ({"host": "gateway.example:8443"}, "http://gateway.example:8443/result/"),
        ({"x-forwarded-proto": "https", "x-forwarded-host": "edif.example"}, "https://edif.example/result/"),
        ({"host": "bad host"}, "http://127.0.0.1:"),
        ({"x-forwarded-host": "a/b"}, "http://127.0.0.1:"),
    ],
)
def test_a_link_names_the_address_that_the_client_used(
    stage: Scene, worker: Worker, headers: dict[str, str], begins: str
) -> None:
    request_id = stage.submit(b"inline 10")
    stage.poll(request_id)
    assert stage.get(f"/response/{request_id}", headers=headers).json()["data"].startswith(begins)


def test_many_large_downloads_at_once_cost_little_memory(stage: Scene, worker: Worker) -> None:
    size, clients = 48 * MIB, 8
    with stage.socket() as (websocket, session):
        stage.submit(f"object {size}".encode(), session=session)
        link = frames(websocket, 60)[-1]["data"]
    expected = hash(pattern(size))
    process = psutil.Process(stage.process.pid)
    httpx.get(link, headers={"range": "bytes=0-1"}, timeout=PATIENCE)
    before = process.memory_info().rss

    def download(_: int) -> int:
        return hash(httpx.get(link, timeout=120).content)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(download, number) for number in range(clients)]
        most = 0
        while not all(found.done() for found in running):
            most = max(most, process.memory_info().rss - before)
    assert all(found.result() == expected for found in running)
    assert most < size
