"""A gateway process on a real Redis and a real S3 server, raw clients, and a worker that does what payloads say."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError
from websockets.sync.client import ClientConnection, connect

from edif_hpc.core.apikeys import ApiKeys
from edif_hpc.core.endpoints import RedisEndpoint, StoreEndpoint
from edif_hpc.core.errors import LeaseLost
from edif_hpc.core.home import Home
from edif_hpc.core.queue import Claim, Queue, Step
from edif_hpc.core.settings import LimitSettings
from edif_hpc.core.store import Store, result_key
from edif_hpc.core.wire import ModelKey, Status
from tests.support.cache_files import CONFIG, TENSORS, entry, tensors_bytes
from tests.support.servers import eventually, free_port

T = TypeVar("T")

MODEL = "edif-test/small"
KEY = ModelKey("nnsight.modeling.transformers.TransformersModel", MODEL, None, "text-generation")
INLINE = 64 * 1024
"""limits.inline_bytes of these tests, small so that both sides of it are cheap."""
PAYLOAD_LIMIT = 4 * 1024 * 1024
LEASE = 30.0
PATIENCE = 60.0
"""Seconds to wait for what takes milliseconds on a machine that is not crowded."""
TRANSFER = {"format": "planes", "part_bytes": 8388608, "digests": ["0f" * 32]}
"""What a worker says of how a result is to be read and checked; to the gateway they are words."""
VERSION = {"nnsight-version": "0.8.1", "python-version": sys.version, "ndif-timestamp": "1.0"}


def cached_model(cache: Path, repo_id: str = MODEL) -> None:
    """A model that is small and never loaded."""
    (entry(cache, repo_id, CONFIG) / "model.safetensors").write_bytes(tensors_bytes(TENSORS))


@dataclass
class Scene:
    home: Home
    redis: RedisEndpoint
    store: StoreEndpoint
    port: int
    keys: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- the gateway's process -----------------------------------------------------------------------------------------

    def start(self, *arguments: str, wait: bool = True) -> subprocess.Popen[bytes]:
        """Start a gateway; the test that starts more than one ends the others itself."""
        command = [sys.executable, "-W", "error", "-m", "edif_hpc.gateway.main", "--home", str(self.home.root)]
        with (self.home.logs / "gateway.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdout=log, stderr=log, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip
        if wait:
            eventually(self.answers, 60.0, "the gateway answering")
        return self.process

    def answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"the gateway ended:\n{self.log()[-3000:]}")
        try:
            return httpx.get(f"{self.url}/ping", timeout=10.0).json() == "pong"
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                assert self.process.wait(60) == 0, self.log()[-3000:]
            finally:
                self.process.kill()

    def log(self) -> str:
        return (self.home.logs / "gateway.log").read_text()

    # -- clients -------------------------------------------------------------------------------------------------------

    def headers(self, user: str = "ann") -> dict[str, str]:
        return {"ndif-api-key": self.keys[user]} if user else {}

    def get(self, path: str, user: str = "ann", **options: Any) -> httpx.Response:
        url = path if path.startswith("http") else self.url + path
        return httpx.get(url, headers={**self.headers(user), **options.pop("headers", {})}, timeout=60.0, **options)

    def post(
        self, payload: bytes, user: str = "ann", session: str = "", headers: dict[str, str] | None = None,
        **envelope: Any,
    ) -> httpx.Response:  # fmt: skip
        data = {"model_key": str(KEY), "session_id": session, "compress": False, "env": {}, **envelope}
        return httpx.post(
            f"{self.url}/request", data={"data": json.dumps(data)}, timeout=60.0,
            files={"blob": ("request", payload, "application/octet-stream")},
            headers={**VERSION, **self.headers(user), **(headers or {})},
        )  # fmt: skip

    def submit(self, payload: bytes, user: str = "ann", session: str = "", **envelope: Any) -> str:
        answer = self.post(payload, user, session, **envelope)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "RECEIVED"
        return str(answer.json()["id"])

    @contextmanager
    def socket(self, user: str = "ann", **headers: str) -> Iterator[tuple[ClientConnection, str]]:
        """A socket, and the session id of its first frame."""
        address = self.url.replace("http", "ws") + "/subscribe"
        with connect(address, additional_headers={**self.headers(user), **headers}, compression=None) as websocket:
            yield websocket, json.loads(websocket.recv(timeout=60))["session_id"]

    def poll(self, request_id: str, user: str = "ann", seconds: float = 60.0) -> dict[str, Any]:
        """Poll as the stock client does, to the terminal status."""

        def ended() -> dict[str, Any] | None:
            answer = self.get(f"/response/{request_id}", user)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found if Status(found["status"]).terminal else None

        return eventually(ended, seconds, f"the end of {request_id}")

    def cancel(self, request_id: str, user: str = "ann") -> str | None:
        """What became of it, or None when there is no such request."""
        answer = httpx.post(f"{self.url}/api/requests/{request_id}/cancel", headers=self.headers(user), timeout=60.0)
        return str(answer.json()["outcome"]) if answer.status_code == 200 else None

    # -- behind the gateway --------------------------------------------------------------------------------------------

    def run(self, body: Callable[[Redis], Awaitable[T]]) -> T:
        async def go() -> T:
            async with self.redis.client() as redis:
                return await body(redis)

        return asyncio.run(go())

    def add_user(self, name: str, *tags: str) -> str:
        async def create(redis: Redis) -> str:
            return (await ApiKeys(redis).create(name, tags=tags))[0]

        self.keys[name] = self.run(create)
        return self.keys[name]


@contextmanager
def scene(
    root: Path, redis: RedisEndpoint, store: StoreEndpoint, settings: str = "", *, start: bool = True
) -> Iterator[Scene]:
    """A home with its gateway, and the users ann, bob and root (an admin)."""
    home = Home(root).create()
    found = Scene(home, redis, store, free_port())
    home.write_private(home.secrets / "redis", redis.password)
    home.write_private(home.secrets / "s3", f"{store.access_key}\n{store.secret_key}")
    home.config.write_text(
        f'[gateway]\nport = {found.port}\n[redis]\nurl = "{redis.url}"\npassword_file = "{home.secrets / "redis"}"\n'
        f'[store]\nendpoint = "{store.endpoint}"\nbucket = "{store.bucket}"\n'
        f'credentials_file = "{home.secrets / "s3"}"\n'
        f"[limits]\ninline_bytes = {INLINE}\npayload_bytes = {PAYLOAD_LIMIT}\n{settings}"
    )
    cached_model(home.hub)
    for user, tags in (("ann", ()), ("bob", ()), ("root", ("admin",))):
        found.add_user(user, *tags)
    try:
        if start:
            found.start()
        yield found
    finally:
        found.stop()


class Worker(threading.Thread):
    """Claims like an agent and does what the first line of a payload says.

    `inline N`, `object N`: a result of N bytes, after `digested` one with digests; `fail TEXT`; `logs N`: N LOG lines
    first; `hold`: waits for `release`.
    """

    def __init__(self, redis: RedisEndpoint, store: StoreEndpoint, target: str = str(KEY)) -> None:
        super().__init__(daemon=True)
        self.redis, self.store, self.target = redis, Store(store), target
        self.release, self.ending = threading.Event(), threading.Event()
        self.claims: list[Claim] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release.set()
        self.ending.set()
        self.join(60)
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        try:
            asyncio.run(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again by the test's thread
            self.failure = error

    async def _work(self) -> None:
        async with self.redis.client() as redis:
            queue = Queue(redis, LimitSettings(inline_bytes=INLINE))
            running: set[asyncio.Task[None]] = set()
            while not self.ending.is_set():
                claim = None
                with suppress(RedisError, OSError):
                    claim = await queue.claim("w1", [self.target], LEASE)
                if claim is None:
                    await asyncio.sleep(0.01)
                    continue
                self.claims.append(claim)
                task = asyncio.create_task(self._serve(queue, claim))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)

    async def _serve(self, queue: Queue, claim: Claim) -> None:
        payload = claim.payload or await asyncio.to_thread(self.store.get, claim.object_key)
        order = payload.split(b"\n")[0].decode()
        digested = order.startswith("digested ")
        verb, _, argument = order.removeprefix("digested ").partition(" ")
        await self._insist(lambda: queue.event(claim, Step(1, Status.RUNNING, "Running.")))
        for number in range(int(argument) if verb == "logs" else 0):
            await queue.event(claim, Step(number + 2, Status.LOG, f"line {number}"))
        while verb == "hold" and not self.release.is_set():
            await asyncio.sleep(0.01)
        with suppress(LeaseLost):
            if verb == "fail":
                await queue.finish(claim, Status.ERROR, argument, meta={"runtime": 0.5}, run_seconds=0.5)
                return
            size = int(argument) if verb in ("inline", "object") else 100
            await self._insist(lambda: self._complete(queue, claim, pattern(size), verb == "object", digested))

    async def _complete(
        self, queue: Queue, claim: Claim, result: bytes, in_store: bool, digested: bool = False
    ) -> None:
        meta = {"runtime": 0.25, "max_mem_by_gpu": {"0": 1}}
        transfer = {**TRANSFER, "bytes": len(result)} if digested else {}
        if not in_store:
            await queue.finish(
                claim, Status.COMPLETED, data={"inline": len(result), **transfer}, meta=meta, run_seconds=0.01,
                result=result,
            )  # fmt: skip
            return
        key = result_key(claim.request_id, claim.attempt, claim.token)
        await asyncio.to_thread(self.store.put, key, result)
        await queue.finish(
            claim, Status.COMPLETED, data={"object": key, "bytes": len(result), **transfer}, meta=meta,
            run_seconds=0.01, object_key=key,
        )  # fmt: skip

    async def _insist(self, write: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                return await write()
            except (RedisError, OSError):
                await asyncio.sleep(0.05)


def pattern(size: int) -> bytes:
    """Bytes that tell a wrong range from a right one."""
    return (b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1)))[:size]


def frames(websocket: ClientConnection, seconds: float = 60.0) -> list[Any]:
    """Frames up to the terminal one: dicts, and bytes for a binary one."""
    found: list[Any] = []
    while True:
        frame = websocket.recv(timeout=seconds)
        found.append(frame if isinstance(frame, bytes) else json.loads(frame))
        if isinstance(frame, bytes) or Status(found[-1]["status"]).terminal:
            return found
