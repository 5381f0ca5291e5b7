"""Two thousand requests, and what is left of them when they have expired: nothing that would add up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from edif_hpc.core.endpoints import redis_endpoint
from edif_hpc.core.home import Home
from edif_hpc.fleet.state import settings_of
from tests.bench import lean
from tests.stock import support
from tests.support.servers import S3Process, eventually
from tests.support.stack import Stack

from .scene import MIB, completed, large, pids, service, worker

REQUESTS = 2000
WARM_UP = 200
"""Requests before the first look: pools of connections and threads, caches and arenas have their size then."""
CLIENTS = 8
RETENTION_SECONDS = 3
MEMORY_BYTES = 24 * MIB
"""What a process may have more of afterwards: what allocators keep, not what a request leaves: 12 KiB for each."""
DESCRIPTORS = 12
FILES_MORE = 12
"""Volumes of the store and segments of Redis's log come and go."""

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


@dataclass(frozen=True)
class Look:
    """Everything that could grow, at one moment."""

    keys: int
    objects: int
    files: int
    scratch: int
    memory: dict[str, int]
    descriptors: dict[str, int]
    threads: dict[str, int]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, cache: Path, store: S3Process) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("growth") / "home"
    with service(home, cache, store, level="none", more=f"retention_seconds = {RETENTION_SECONDS}") as found:
        yield found


def counted_keys(stack: Stack) -> int:
    async def count() -> int:
        home = Home(stack.home)
        async with redis_endpoint(home, settings_of(home).settings).client() as redis:
            return int(await redis.dbsize())

    return asyncio.run(count())


def look(stack: Stack, store: S3Process) -> Look:
    from edif_hpc.core.store import Store

    memory: dict[str, int] = {}
    descriptors: dict[str, int] = {}
    threads: dict[str, int] = {}
    for name, pid in pids(stack).items():
        found = psutil.Process(pid)
        children = [] if name == "supervisor" else found.children(recursive=True)
        for each in (found, *children):
            label = name if each.pid == pid else f"{name}'s model host"
            memory[label] = memory.get(label, 0) + each.memory_info().rss
            descriptors[label] = descriptors.get(label, 0) + each.num_fds()
            threads[label] = threads.get(label, 0) + each.num_threads()
    client = Store(store.endpoint).client
    stored = client.list_objects_v2(Bucket=store.endpoint.bucket).get("Contents", [])
    scratch = [path for path in Path("/tmp").glob("edif-hpc-*") if path.is_dir()]
    return Look(
        counted_keys(stack),
        len(stored),
        sum(len(files) for _, _, files in os.walk(stack.home)),
        sum(len(files) for path in scratch if stack_owns(stack, path) for _, _, files in os.walk(path)),
        memory,
        descriptors,
        threads,
    )


def stack_owns(stack: Stack, path: Path) -> bool:
    return any(path.name.startswith(f"edif-hpc-{name}-") for name in pids(stack))


def ask(stack: Stack, prepared: lean.Prepared, number: int) -> None:
    """So many blocking requests, each over connections of its own."""
    host, port = stack.url.removeprefix("http://").split(":")

    async def client(left: Iterator[int]) -> None:
        for _ in left:
            await lean.blocking(host, int(port), prepared, stack.key)

    async def everybody() -> None:
        left = iter(range(number))
        await asyncio.gather(*(client(left) for _ in range(CLIENTS)))

    asyncio.run(everybody())


def expired(stack: Stack, store: S3Process, keys: int) -> None:
    """Wait until what was asked has expired, objects and all."""
    eventually(lambda: counted_keys(stack) <= keys, 60, f"no more than {keys} keys", pause=0.2)
    eventually(lambda: look(stack, store).objects == 0, 60, "no objects", pause=0.5)


def test_two_thousand_requests_leave_nothing(stack: Stack, gpt2: Any, store: S3Process) -> None:
    """2,000 requests leave no keys, files, memory or descriptors behind when they have expired"""
    kept = support.ask(gpt2, 1.0, support.Keep)
    prepared = lean.Prepared(gpt2.to_model_key(), kept.blob, True, gpt2._remoteable_get_env())
    with worker(stack, "worker-a"):
        completed(stack, large(gpt2))
        ask(stack, prepared, WARM_UP)
        expired(stack, store, settled(stack))
        before = look(stack, store)
        began = time.monotonic()
        ask(stack, prepared, REQUESTS)
        for _ in range(10):
            completed(stack, large(gpt2))
        took = time.monotonic() - began
        expired(stack, store, before.keys)
        after = look(stack, store)
    print(f"{REQUESTS} requests in {took:.0f} s")
    for name in ("keys", "objects", "files", "scratch"):
        print(f"{name:<12} {getattr(before, name):>6} -> {getattr(after, name):>6}")
    for name in before.memory:
        print(
            f"{name:<40} {before.memory[name] / MIB:6.1f} -> {after.memory.get(name, 0) / MIB:6.1f} MiB, "
            f"{before.descriptors[name]} -> {after.descriptors.get(name, 0)} descriptors, "
            f"{before.threads[name]} -> {after.threads.get(name, 0)} threads"
        )
    assert after.keys <= before.keys
    assert after.objects == 0
    assert after.files <= before.files + FILES_MORE
    assert after.scratch <= before.scratch
    assert after.memory.keys() == before.memory.keys()
    for name, memory in before.memory.items():
        if name != "redis":  # its allocator keeps what it had at its busiest
            assert after.memory[name] <= memory + MEMORY_BYTES, name
        assert after.descriptors[name] <= before.descriptors[name] + DESCRIPTORS, name


def settled(stack: Stack) -> int:
    """How many keys stay when every request has expired: the count that holds still over a retention."""
    seen = counted_keys(stack)

    def still() -> bool:
        nonlocal seen, since
        now = counted_keys(stack)
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 2 * RETENTION_SECONDS

    since = time.monotonic()
    eventually(still, 120, "the number of keys holding still", pause=0.2)
    return seen
