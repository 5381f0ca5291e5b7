"""Requests that are there already: listed when dead, tried again, deleted, and their results downloaded, by the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from edif_hpc.core.queue import Queue, Release, keys
from edif_hpc.core.settings import LimitSettings
from edif_hpc.core.store import Store
from tests.support.servers import eventually

from .scene import INLINE, KEY, LEASE, Scene, Worker, pattern

LARGE = 3 * INLINE


def command(stage: Scene, *arguments: str, user: str = "ann", cwd: Path | None = None, fails: bool = False) -> str:
    """One `edif-hpc` command, as somebody with nothing but an address and a key. Returns what it said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDIF_HPC_", "NDIF_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "edif_hpc.cli", *arguments, "--home", str(stage.home.root / "none")],
        env={**kept, "NDIF_HOST": stage.url, "NDIF_API_KEY": stage.keys[user]}, cwd=cwd,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def shown(stage: Scene, request_id: str, user: str = "ann") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command(stage, "requests", "show", request_id, "--json", user=user))
    return found


def retried(stage: Scene, request_id: str, user: str = "ann") -> str:
    return str(json.loads(command(stage, "requests", "retry", request_id, "--json", user=user))["id"])


def failed(stage: Scene, worker: Worker, payload: bytes = b"fail by itself") -> str:
    request_id = stage.submit(payload)
    assert stage.poll(request_id)["status"] == "ERROR"
    return request_id


def left(stage: Scene, request_id: str) -> set[str]:
    """Every key in Redis that names the request, or lists it."""

    async def look(redis: Redis) -> set[str]:
        names = {name.decode() async for name in redis.scan_iter(f"*{request_id}*")}
        for listed in (keys.user("ann"), keys.DEAD, keys.open_requests("ann")):
            found: Awaitable[Any] = redis.zscore(listed, request_id)
            if await found is not None:
                names.add(listed)
        return names

    return stage.run(look)


def objects(stage: Scene, request_id: str) -> list[str]:
    client = Store(stage.store).client
    found = client.list_objects_v2(Bucket=stage.store.bucket).get("Contents", [])
    return [each["Key"] for each in found if request_id in each["Key"]]


def lose(stage: Scene, request_id: str, times: int = 3) -> None:
    """Have so many attempts at it end without an explanation."""

    async def losing(redis: Redis) -> None:
        queue = Queue(redis, LimitSettings())
        for _ in range(times):
            claim = await queue.claim("w9", [str(KEY)], LEASE)
            assert claim is not None
            assert claim.request_id == request_id
            await queue.release(claim, Release.LOSS, "its executor was killed")

    stage.run(losing)


def test_the_dead_are_listed_with_the_cause_and_tried_again_as_new_requests(stage: Scene) -> None:
    request_id = stage.submit(b"inline 10")
    lose(stage, request_id)
    assert stage.poll(request_id)["description"] == "Given up after 3 attempts: its executor was killed."
    for user, seen in (("ann", True), ("bob", False), ("root", True)):
        rows = json.loads(command(stage, "requests", "dead", "--json", user=user))
        assert (request_id in {row["id"] for row in rows}) is seen
    assert "its executor was killed" in command(stage, "requests", "dead")
    again = retried(stage, request_id)
    with Worker(stage.redis, stage.store):
        assert stage.poll(again)["status"] == "COMPLETED"
    assert (shown(stage, again)["repeats"], shown(stage, request_id)["repeated_by"]) == (request_id, again)
    assert shown(stage, request_id)["status"] == "ERROR"
    assert again in command(stage, "requests", "show", request_id)


def test_an_admins_retry_is_the_users_request(stage: Scene, worker: Worker) -> None:
    request_id = failed(stage, worker)
    assert "no such request" in command(stage, "requests", "retry", request_id, user="bob", fails=True)
    again = retried(stage, request_id, user="root")
    assert stage.poll(again)["description"] == "by itself"
    assert shown(stage, again)["user"] == "ann"


def test_a_large_payload_is_kept_for_another_try_and_each_has_its_own(stage: Scene, worker: Worker) -> None:
    payload = b"fail large\n" + bytes(LARGE)
    request_id = failed(stage, worker, payload)
    again = retried(stage, request_id)
    assert stage.poll(again)["description"] == "large"
    command(stage, "requests", "delete", request_id)
    assert (len(objects(stage, request_id)), len(objects(stage, again))) == (0, 1)
    assert stage.poll(retried(stage, again))["description"] == "large"


def test_what_did_not_fail_is_not_tried_again(stage: Scene) -> None:
    waiting = stage.submit(b"inline 10")
    assert "has not ended" in command(stage, "requests", "retry", waiting, fails=True)
    with Worker(stage.redis, stage.store):
        stage.poll(waiting)
    assert "has a result" in command(stage, "requests", "retry", waiting, fails=True)
    refused = stage.submit(b"inline 10", model_key=str(KEY).replace("small", "unknown"))
    assert "Nothing of this request's payload" in command(stage, "requests", "retry", refused, fails=True)


@pytest.mark.parametrize(
    "payload",
    [b"inline 10", b"object 300000", b"fail\n" + bytes(LARGE)],
    ids=["inline result", "stored result", "stored payload"],
)
def test_deleting_leaves_nothing(stage: Scene, worker: Worker, payload: bytes) -> None:
    request_id = stage.submit(payload)
    stage.poll(request_id)
    assert left(stage, request_id)
    assert "no such request" in command(stage, "requests", "delete", request_id, user="bob", fails=True)
    link = shown(stage, request_id).get("result")
    assert "Deleted" in command(stage, "requests", "delete", request_id, user="root" if link else "ann")
    assert left(stage, request_id) == set()
    assert objects(stage, request_id) == []
    assert stage.get(f"/response/{request_id}").json()["status"] == "ERROR"
    if link:
        assert httpx.get(link, timeout=60).status_code == 404


def test_what_waits_or_runs_is_not_deleted(stage: Scene) -> None:
    request_id = stage.submit(b"hold")
    for state in ("waits", "runs"):
        said = command(stage, "requests", "delete", request_id, fails=True)
        assert state in said
        assert f"edif-hpc cancel {request_id}" in said
        if state == "waits":
            worker = Worker(stage.redis, stage.store)
            worker.start()
            eventually(lambda: stage.get(f"/response/{request_id}").json()["status"] == "RUNNING", 60, "RUNNING")
    worker.__exit__()
    command(stage, "requests", "delete", request_id)
    assert left(stage, request_id) == set()


def test_a_deletion_while_the_store_is_away_is_made_up_for(stage: Scene) -> None:
    """By the fleet, which finds the objects due."""

    async def forget(redis: Redis) -> tuple[str, list[str]]:
        return await Queue(redis, LimitSettings()).delete(request_id, "")

    with Worker(stage.redis, stage.store) as worker:
        request_id = failed(stage, worker, b"fail\n" + bytes(LARGE))
    outcome, named = stage.run(forget)
    assert (outcome, named) == ("deleted", objects(stage, request_id))
    due = stage.run(lambda redis: redis.zscore(keys.OBJECTS, named[0]))
    assert due <= stage.run(lambda redis: redis.time())[0] * 1000 + 1000


def test_a_lost_client_finds_its_result(stage: Scene) -> None:
    with Worker(stage.redis, stage.store) as worker:
        with stage.socket() as (_, session):
            request_id = stage.submit(b"hold", session=session)
        worker.release.set()
        stage.poll(request_id)
    rows = {row["id"]: row for row in json.loads(command(stage, "requests", "list", "--json"))}
    assert rows[request_id]["status"] == "COMPLETED"
    assert request_id not in {row["id"] for row in json.loads(command(stage, "requests", "list", "--json", user="bob"))}


@pytest.mark.parametrize(("verb", "size"), [("inline", 1000), ("object", 5_000_000)])
def test_a_result_is_downloaded_and_an_interrupted_one_goes_on(
    stage: Scene, worker: Worker, tmp_path: Path, verb: str, size: int
) -> None:
    request_id = stage.submit(f"{verb} {size}".encode())
    stage.poll(request_id)
    command(stage, "result", request_id, cwd=tmp_path)
    assert (tmp_path / f"{request_id}.pt").read_bytes() == pattern(size)
    (tmp_path / f".mine.{request_id}.part").write_bytes(pattern(size)[: size // 3])
    told = json.loads(command(stage, "result", request_id, "--out", "mine", "--json", cwd=tmp_path))
    assert (told["bytes"], told["resumed_from"]) == (size, size // 3)
    assert (tmp_path / "mine").read_bytes() == pattern(size)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", f"{request_id}.pt"}


def test_a_download_of_another_size_is_refused(stage: Scene, worker: Worker, tmp_path: Path) -> None:
    request_id = stage.submit(b"inline 1000")
    stage.poll(request_id)
    part = tmp_path / f".{request_id}.part"
    part.write_bytes(bytes(2000))
    assert "2000 bytes and the result has 1000" in command(stage, "result", request_id, cwd=tmp_path, fails=True)
    command(stage, "result", request_id, cwd=tmp_path)
    assert (tmp_path / f"{request_id}.pt").read_bytes() == pattern(1000)


def test_without_a_result_there_is_a_sentence(stage: Scene, tmp_path: Path) -> None:
    waiting = stage.submit(b"fail as planned")
    assert f"edif-hpc logs {waiting} -f" in command(stage, "result", waiting, cwd=tmp_path, fails=True)
    with Worker(stage.redis, stage.store):
        stage.poll(waiting)
    assert "as planned" in command(stage, "result", waiting, cwd=tmp_path, fails=True)
    assert list(tmp_path.iterdir()) == []


def test_printed_lines_are_followed_to_the_end(stage: Scene, worker: Worker) -> None:
    said = command(stage, "logs", stage.submit(b"logs 3"), "-f")
    assert [line.split()[1] for line in said.splitlines()][-4:] == ["LOG", "LOG", "LOG", "COMPLETED"]


def test_uploads_of_attempts_that_are_over_are_known_and_those_that_go_on_too(stage: Scene) -> None:
    from edif_hpc.fleet.objects import Objects

    store = Store(stage.store)
    request_id = stage.submit(b"inline 10")

    async def story(redis: Redis) -> tuple[set[str], set[str]]:
        queue = Queue(redis, LimitSettings())
        claim = await queue.claim("w9", [str(KEY)], LEASE)
        assert claim is not None
        alive = f"results/{request_id}/1-{claim.token[:16]}"
        for key in (alive, f"results/{request_id}/1-{'0' * 16}", f"results/{'0' * 32}/1-{'0' * 16}", "payloads/new"):
            store.client.create_multipart_upload(Bucket=stage.store.bucket, Key=key)
        await Objects(queue, store, lambda: True).abort_abandoned()
        between = {upload.key for upload in store.uploads()}
        await queue.release(claim, Release.HANDBACK, "it is over")
        await Objects(queue, store, lambda: True).abort_abandoned()
        return between, {upload.key for upload in store.uploads()}

    between, after = stage.run(story)
    store.abort(store.uploads())
    assert {key.partition("/")[0] for key in between} == {"results", "payloads"}
    assert len(between) == 2
    assert after == {"payloads/new"}
    assert stage.cancel(request_id) == "ended"
