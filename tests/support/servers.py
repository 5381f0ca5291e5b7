"""Real Redis and S3 servers for tests, started from the same wheels as the product starts them from."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from edif_hpc.core.endpoints import RedisEndpoint, StoreEndpoint, embedded_ports, store_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store
from edif_hpc.fleet.embedded import redis_binary, store_command, store_environment
from edif_hpc.fleet.ports import is_free, remove_sockets, sockets

T = TypeVar("T")


PORTS = range(10_000, 16_000)
"""Below the kernel's ephemeral ports, Slurm's in tests/cluster and the embedded servers' own: no connection takes
one between its choice here and the moment a server listens on it. Each test process has a share of its own, so
neither does another one's server."""


def free_port() -> int:
    """A port on loopback where nobody listens now, and where no SeaweedFS that was killed has left a socket: the server
    that it is for may run as another user, who cannot replace it."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    sharers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    tried = random.sample(PORTS[number::sharers], 200)
    return next(port for port in tried if is_free(port) and not any(sockets(port)))


def eventually(
    condition: Callable[[], T | None], seconds: float = 30.0, what: str = "the condition", *, pause: float = 0.02
) -> T:
    """Poll until the condition is true; fails with a sentence when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds} s")
        time.sleep(pause)


class RedisProcess:
    """One Redis with a password, on loopback, that can be killed and started again on its port."""

    def __init__(self, folder: Path, *, persistent: bool = False, flushes: str = "always") -> None:
        """`flushes`: Redis's `appendfsync`."""
        self.folder = folder
        self.options = ["--appendonly", "yes" if persistent else "no", "--appendfsync", flushes]
        self.port = free_port()
        self.endpoint = RedisEndpoint(f"redis://127.0.0.1:{self.port}/0", "", "test-password")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", self.endpoint.password,
             "--dir", str(self.folder), *self.options, "--save", "", "--maxmemory-policy", "noeviction"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(self._answers, what="Redis answering")

    def _answers(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisEndpoint]:
    """One Redis with a password, on loopback, killed at the end."""
    redis = RedisProcess(folder)
    try:
        redis.start()
        yield redis.endpoint
    finally:
        redis.kill()
        shutil.rmtree(folder, ignore_errors=True)


class S3Process:
    """One SeaweedFS with a bucket, as the product starts it, that can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.settings = Home(folder).create(), Settings()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> StoreEndpoint:
        return store_endpoint(self.home, self.settings)

    def start(self) -> None:
        with (self.folder / "store.log").open("a") as log:
            self.process = subprocess.Popen(
                store_command(self.home, self.settings), cwd=self.home.store, env=store_environment(self.home),
                stdout=log, stderr=log,
            )  # fmt: skip
        eventually(self._answers, 60.0, "the object store answering")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "store.log").read_text()[-3000:]
        try:
            Store(self.endpoint).ensure_bucket()
        except Unavailable:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            remove_sockets(embedded_ports(self.home))


@contextmanager
def s3_server(folder: Path) -> Iterator[StoreEndpoint]:
    """One SeaweedFS with a bucket, as the product starts it, killed at the end."""
    store = S3Process(folder)
    try:
        store.start()
        yield store.endpoint
    finally:
        store.kill()
        shutil.rmtree(folder, ignore_errors=True)
