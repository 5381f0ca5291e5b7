"""`ps`: every component of a home by name, from its records, the kernel and what workers say in Redis."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from .context import HomeOption, JsonOption, locate, refusals, settings_for, table

if TYPE_CHECKING:
    from edif_hpc.core.home import Home
    from edif_hpc.core.registry import WorkerRecord
    from edif_hpc.core.settings import Settings

PS_HELP = """Show every component: process, address, uptime and memory; workers with their models and deadline.

Examples:

  edif-hpc ps

  edif-hpc ps --json
"""
REDIS_SECONDS = 3.0


@dataclass
class Row:
    """One component. Times are Unix seconds; memory is PSS where the kernel lets us read it, else RSS."""

    name: str
    state: str
    pid: int | None = None
    host: str = ""
    address: str = ""
    started: float | None = None
    memory_bytes: int | None = None
    version: str = ""
    pool: str = ""
    isolation: str = ""
    device: str = ""
    models: str = ""
    deadline: float | None = None
    running: int | None = None


def register(app: typer.Typer) -> None:
    app.command("ps", help=PS_HELP)(ps)


@refusals
def ps(home: HomeOption = None, json: JsonOption = False) -> None:
    from .show import duration, moment, size

    place = locate(home)
    rows = [asdict(row) for row in everything(place, settings_for(place).settings)]
    if not json:
        for row in rows:
            row["uptime"] = duration(time.time() - row["started"]) if row["started"] else ""
            row["memory"] = size(row["memory_bytes"])
            row["deadline"] = moment(row["deadline"])
    columns = {
        "name": "NAME", "state": "STATE", "pid": "PID", "address": "ADDRESS", "uptime": "UPTIME", "memory": "MEMORY",
        "pool": "POOL", "isolation": "ISOLATION", "models": "MODELS", "deadline": "DEADLINE",
    }  # fmt: skip
    if not json and not any(row["deadline"] for row in rows):
        del columns["deadline"]
    table("Components", columns, rows, json=json, empty=f"Nothing runs in {place.root}; start it with `edif-hpc up`.")


def everything(home: Home, settings: Settings) -> list[Row]:
    """All components of a home, the supervisor first."""
    from edif_hpc.fleet import process

    order = {"supervisor": 0, "gateway": 1, "fleet": 2, "redis": 3, "store": 4}
    found: dict[str, Row] = {}
    for record in sorted(process.records(home), key=lambda record: (order.get(record.name, 9), record.started)):
        state = _state(record.name) if record.alive else "gone" if record.here else "unknown"
        row = Row(record.name, state, record.pid, record.host, record.address, record.started, version=record.version)
        row.memory_bytes = memory_of(record.pid) if record.alive else None
        found[record.name] = row
    workers = _workers(home, settings)
    for worker in workers:
        row = found.setdefault(worker.worker_id, Row(worker.worker_id, "running", worker.pid, worker.host))
        _add_worker(row, worker)
        for host in _hosts(worker):
            found[host.name] = host
    return list(found.values())


def _state(name: str) -> str:
    """Of a process that lives: a gateway may be on its way in or out."""
    from edif_hpc.fleet.supervise import GATEWAY, SUCCESSOR

    if name == SUCCESSOR:
        return "starting"
    return "draining" if name.startswith(f"{GATEWAY}-") else "running"


def _add_worker(row: Row, worker: WorkerRecord) -> None:
    row.state = "gone" if _has_died(worker) else worker.state
    row.pool, row.isolation, row.device = worker.pool, worker.isolation.value, worker.device
    row.started, row.version, row.deadline, row.running = (
        worker.started,
        worker.version,
        worker.deadline,
        worker.running,
    )
    row.models = ", ".join(
        f"{_repo(model.model_key)} ({model.error or model.state})" for model in worker.models
    )  # fmt: skip


def _has_died(worker: WorkerRecord) -> bool:
    """Whether it ended here without a goodbye: what it said of itself stands until its lease has run out."""
    import socket

    import psutil

    return worker.host == socket.gethostname() and not psutil.pid_exists(worker.pid)


def _hosts(worker: WorkerRecord) -> Iterable[Row]:
    """The model hosts of a worker; their processes can be read on the machine they run on alone."""
    import socket

    here = worker.host == socket.gethostname()
    for model in worker.models:
        for name, pid in model.pids.items():
            if name != "host":
                continue
            yield Row(
                name=f"host-{_short(worker.worker_id)}-{_repo(model.model_key).rpartition('/')[2]}",
                state=model.state,
                pid=pid,
                host=worker.host,
                started=_started(pid) if here else None,
                memory_bytes=model.memory_bytes,  # weights and zygote included, unlike the process's own
                version=worker.version,
                pool=worker.pool,
                models=_repo(model.model_key),
            )


def _short(worker_id: str) -> str:
    return worker_id.removeprefix("worker-")


def _repo(model_key: str) -> str:
    from edif_hpc.core.errors import ModelKeyError
    from edif_hpc.core.wire import ModelKey

    try:
        return ModelKey.parse(model_key).repo_id
    except ModelKeyError:
        return model_key


def _workers(home: Home, settings: Settings) -> list[WorkerRecord]:
    """What workers say; nothing while Redis is away, for then `ps` shows what the kernel knows."""
    import asyncio

    from redis.exceptions import RedisError

    from edif_hpc.core.endpoints import redis_endpoint
    from edif_hpc.core.errors import SettingsError
    from edif_hpc.core.registry import Registry

    async def ask() -> list[WorkerRecord]:
        redis = redis_endpoint(home, settings).client(retries=0)
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                return await Registry(redis).workers()
        finally:
            await redis.aclose()

    try:
        return asyncio.run(ask())
    except (RedisError, OSError, TimeoutError, SettingsError):
        return []


def memory_of(pid: int) -> int | None:
    """PSS where it can be read (worker and host hide themselves from an ordinary user), else RSS, else nothing."""
    import psutil

    try:
        process = psutil.Process(pid)
        try:
            found: Any = process.memory_full_info()
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
        return int(found.pss)
    except psutil.Error:
        return None


def _started(pid: int) -> float | None:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
