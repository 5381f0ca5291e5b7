"""Real Redis and S3 servers for tests, started from the same wheels as the product starts them from."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.fleet.embedded import redis_binary

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def eventually(condition: Callable[[], T | None], seconds: float = 30.0, what: str = "the condition") -> T:
    """Poll until the condition is true; fails with a sentence when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds} s")
        time.sleep(0.02)


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisEndpoint]:
    """One Redis with a password, on loopback, killed at the end."""
    port, password = free_port(), "test-password"
    process = subprocess.Popen(
        [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, "--dir", str(folder),
         "--appendonly", "no", "--save", "", "--maxmemory-policy", "noeviction"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def answers() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(answers, what="Redis answering")
        yield RedisEndpoint(f"redis://127.0.0.1:{port}/0", "", password)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
