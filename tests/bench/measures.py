"""How each number is taken. Every function measures one subject once; `run` alternates between subjects and repeats."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
from redis import Redis

from edif_hpc.core.endpoints import redis_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.queue import keys
from edif_hpc.core.settings import load

from . import lean
from .asks import Ask
from .subjects import Subject, is_model_process

MIB = 1024**2
ANSWER_SECONDS = 30.0
POLL_SECONDS = 0.005


def stock_latencies(subject: Subject, ask: Ask, count: int) -> list[float]:
    """Seconds of blocking traces by the stock client, one after the other."""
    subject.point_stock_client()
    subject.sent += count
    return [seconds(lambda: ask.trace({"remote": True})) for _ in range(count)]


def lean_latencies(subject: Subject, ask: Ask, count: int) -> list[lean.Answer]:
    async def all_of_them() -> list[lean.Answer]:
        return [await lean.blocking(*subject.address, ask.prepared, subject.key) for _ in range(count)]

    subject.sent += count
    return asyncio.run(all_of_them())


def throughput(subject: Subject, ask: Ask, clients: int, time_box: float) -> float:
    rate = asyncio.run(lean.throughput(*subject.address, ask.prepared, clients, time_box, subject.key))
    subject.sent += round(rate * time_box)
    return rate


def burst(subject: Subject, ask: Ask, total: int) -> float:
    subject.sent += total
    return asyncio.run(lean.burst(*subject.address, ask.prepared, total, subject.key))


def large(subject: Subject, ask: Ask) -> float:
    """Seconds until the stock client holds a result of 140 MB."""
    assert ask.large is not None
    block = ask.large
    subject.point_stock_client()
    subject.sent += 1
    return seconds(lambda: block({"remote": True}))


def seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


# -- from the service's own records -----------------------------------------------------------------------------------


def overheads(subject: Subject, answers: list[lean.Answer]) -> list[float]:
    """Seconds between body received and terminal event written, less the block's run time, per request."""
    assert subject.home is not None
    home = Home(subject.home)
    redis = Redis.from_url(redis_endpoint(home, load(home.config).settings).with_credentials())
    found = []
    for answer in answers:
        fields = ("record", "submitted", "finished", "meta")
        record, submitted, finished, meta = redis.hmget(keys.request(answer.request_id), fields)
        began = json.loads(record).get("received", int(submitted) / 1000)
        found.append(int(finished) / 1000 - began - json.loads(meta)["runtime"])
    redis.close()
    return found


# -- processes --------------------------------------------------------------------------------------------------------


def service_memory(subject: Subject) -> dict[str, float]:
    """PSS in MiB of everything but model host, zygote and executors, by what it is."""
    found: dict[str, float] = {}
    for process in subject.processes():
        try:
            if not is_model_process(process):
                name = _component(process)
                found[name] = found.get(name, 0.0) + process.memory_full_info().pss / MIB
        except psutil.NoSuchProcess:
            continue
    return found


def gateway_memory(subject: Subject, ask: Ask, requests: int) -> float:
    """Resident MiB of the gateway once it has served that many requests."""
    missing = requests - subject.sent
    while missing > 0:
        lean_latencies(subject, ask, min(missing, 100))
        missing -= 100
    return subject.process("gateway").memory_info().rss / MIB


def gateway_start(subject: Subject) -> float:
    """Seconds from a gateway process's start until it answers: it is killed, and its supervisor starts another."""
    before = subject.process("gateway").pid
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{subject.url}/ping", timeout=1.0).status_code == 200:
                return _age(subject.process("gateway").pid)
        except httpx.HTTPError:
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the gateway did not come back within {ANSWER_SECONDS:g} s")


def _age(pid: int) -> float:
    """Seconds since a process started, on one clock: psutil's own goes through the wall clock's whole seconds."""
    with open(f"/proc/{pid}/stat") as stat, open("/proc/uptime") as uptime:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def _component(process: psutil.Process) -> str:
    command = process.cmdline()
    for name in ("gateway", "fleet", "worker", "supervise"):
        if name in command:
            return name
    return process.name()


# -- statistics -------------------------------------------------------------------------------------------------------


def p50(values: list[float]) -> float:
    return statistics.median(values)


def p95(values: list[float]) -> float:
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]
