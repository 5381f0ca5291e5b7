"""A service whose workers the tests start themselves, an object store that can go away, and blocks that wait."""

# A block's variables are what it saves: ruff cannot know that they are used.
# ruff: noqa: F841

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from edif_hpc.core.home import Home
from edif_hpc.fleet import process
from tests.stock.support import PROMPT, backend
from tests.support.servers import S3Process, eventually
from tests.support.stack import EDIF_HPC, Stack, running

HEARTBEAT = 1.0
SETTINGS = """
[worker]
threads = 1
idle_seconds = 3600
heartbeat_seconds = {heartbeat}
upload_seconds = {upload_seconds}
spool_bytes = {spool_bytes}
[limits]
inline_bytes = 65536
{more}
[fleet]
workers = 0
[store]
endpoint = "{endpoint}"
credentials_file = "{credentials}"
"""
LARGE_FLOATS = 1_000_000
"""4 MB: too large for Redis here."""
MIB = 1024 * 1024
PATIENCE = 120.0
"""Seconds to wait for what takes a few on a machine that is not crowded."""


@contextmanager
def service(
    home: Path, cache: Path, store: S3Process, level: str = "process", more: str = "", **settings: float
) -> Iterator[Stack]:
    """A service on a store of the tests' own; no worker runs yet. `more`: lines of `[limits]`."""
    home.mkdir(mode=0o700)
    credentials = home / "s3-credentials"
    credentials.write_text(f"{store.endpoint.access_key}\n{store.endpoint.secret_key}")
    credentials.chmod(0o600)
    values = {"heartbeat": HEARTBEAT, "upload_seconds": 120, "spool_bytes": 64 * MIB, "more": more, **settings}
    text = SETTINGS.format(endpoint=store.endpoint.endpoint, credentials=credentials, **values)
    with running(home, cache, level, text) as stack:
        yield stack


@contextmanager
def worker(stack: Stack, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One worker by the command line; told to end afterwards, and killed when it does not."""
    identity: dict[str, Any] = {"user": stack.uid, "group": stack.uid, "extra_groups": []} if stack.uid else {}
    with (stack.home / "logs" / f"{name}.log").open("ab") as log:
        started = subprocess.Popen(
            [str(EDIF_HPC), "worker", "--id", name, *options, "--home", str(stack.home)],
            env=stack.environment(), cwd="/", stdout=log, stderr=log, start_new_session=True, **identity,
        )  # fmt: skip
    try:
        eventually(lambda: name in pids(stack) or started.poll() is not None, PATIENCE, f"{name} being recorded")
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        try:
            started.wait(45)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def pids(stack: Stack) -> dict[str, int]:
    """Living components by name."""
    return {record.name: record.pid for record in process.records(Home(stack.home)) if record.alive}


def serves(stack: Stack, name: str) -> None:
    """Wait until a worker takes requests."""

    def there() -> bool:
        return any(
            each["worker_id"] == name and each["state"] == "serving" for each in get(stack, "/api/workers")["workers"]
        )

    eventually(there, PATIENCE, f"{name} serving")


# -- requests ----------------------------------------------------------------------------------------------------------


def small(model: Any) -> str:
    """A request that takes a moment and whose result rides in Redis."""
    sent = backend(model, blocking=False)
    with model.trace(PROMPT, backend=sent):
        answer = model.lm_head.output[0, -1, :4].clone().save()
    return str(sent.job_id)


def large(model: Any) -> str:
    """A request whose result goes to the object store."""
    sent = backend(model, blocking=False)
    with model.trace(PROMPT, backend=sent):
        first = model.lm_head.output[0, -1].sum()
        answer = torch.rand(LARGE_FLOATS).save()
    return str(sent.job_id)


def held(model: Any, gate: Path) -> str:
    """A request that prints its process and waits until the file `gate` is there."""
    sent, path = backend(model, blocking=False), str(gate)
    with model.trace(PROMPT, backend=sent):
        print(os.getpid())
        while not os.path.exists(path):
            time.sleep(0.02)
        answer = model.lm_head.output[0, -1, :4].clone().save()
    return str(sent.job_id)


def get(stack: Stack, path: str) -> Any:
    answer = httpx.get(f"{stack.url}{path}", headers={"ndif-api-key": stack.key}, timeout=60)
    answer.raise_for_status()
    return answer.json()


def post(stack: Stack, path: str) -> Any:
    answer = httpx.post(f"{stack.url}{path}", headers={"ndif-api-key": stack.key}, timeout=60)
    answer.raise_for_status()
    return answer.json()


def shown(stack: Stack, request_id: str) -> Any:
    return get(stack, f"/api/requests/{request_id}")


def events(stack: Stack, request_id: str) -> list[tuple[str, str, float]]:
    """Status, description and time of everything that happened to a request."""
    found = get(stack, f"/api/requests/{request_id}/events")["events"]
    return [(event["status"], event["description"], event["at"]) for event in found]


def lines(stack: Stack, request_id: str) -> list[str]:
    return [text for status, text, _ in events(stack, request_id) if status == "LOG"]


def reached(stack: Stack, request_id: str, *statuses: str, seconds: float = PATIENCE) -> Any:
    """Wait until a request is at one of these statuses; returns what is recorded of it."""

    def there() -> Any:
        found = shown(stack, request_id)
        return found if found["status"] in statuses else None

    return soon(stack, there, seconds, f"{request_id} being {' or '.join(statuses)}")


def completed(stack: Stack, request_id: str, seconds: float = PATIENCE) -> Any:
    found = reached(stack, request_id, "COMPLETED", "ERROR", seconds=seconds)
    assert found["status"] == "COMPLETED", json.dumps(found, indent=1)
    terminal = [status for status, _, _ in events(stack, request_id) if status in ("COMPLETED", "ERROR")]
    assert terminal == ["COMPLETED"]
    return found


def process_of(stack: Stack, request_id: str, attempt: int = 1) -> int:
    """The process that runs a held request, as it printed."""

    def said() -> list[str] | None:
        found = lines(stack, request_id)
        return found if len(found) >= attempt else None

    return int(soon(stack, said, PATIENCE, f"{request_id} printing its process")[attempt - 1])


def soon(stack: Stack, condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until the condition is true; fails with the ends of all logs."""
    try:
        return eventually(condition, seconds, what)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{stack.logs()}") from None
