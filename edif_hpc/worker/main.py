"""Start one worker: read the endpoints, see what the machine has, run the agent until a signal or its own end."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import uvloop

from edif_hpc import __version__
from edif_hpc.core import log, walltime
from edif_hpc.core.endpoints import Role, redis_endpoint, store_endpoint
from edif_hpc.core.errors import ComponentError, SettingsError
from edif_hpc.core.home import Home
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.queue import Queue, Release
from edif_hpc.core.registry import Registry, WorkerRecord
from edif_hpc.core.scratch import scratch
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store
from edif_hpc.hardware.detect import detect
from edif_hpc.hardware.profiles import Machine
from edif_hpc.hardware.tensor_parallel import join_devices

from . import sandbox
from .agent import Agent
from .environment import environment
from .handover import Chain
from .process import held
from .residents import Residents, model_memory
from .sandbox.kernel import protect_process

HOST_SHARE = 0.75
GPU_SHARE = 0.9
"""Shares of memory that models may take when the settings name none; the rest is for requests."""
GC_THRESHOLDS = (50_000, 20, 50)
"""Requests make few cycles; the default threshold of 700 runs the collector several times for each."""

MODEL_LIBRARIES = ("torch", "nnsight")
"""What model hosts import; the agent itself must not."""
SCRATCH = "edif-hpc-"
"""How the names of workers' scratch folders begin."""

logger = log.get("worker")


def serve(
    home: Home,
    settings: Settings,
    *,
    worker_id: str = "",
    pool: str = "local",
    deadline: float | None = None,
    chain: Chain | None = None,
) -> None:
    """Run a worker in the foreground.

    Raises:
        EdifError: it cannot serve; the sentence says why.
    """
    if missing := [name for name in MODEL_LIBRARIES if find_spec(name) is None]:
        raise ComponentError(f"A worker needs {' and '.join(missing)}: install edif-hpc[worker].")
    log.configure("worker", settings.log_level)
    protect_process()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(home, settings, worker_id or f"worker-{secrets.token_hex(3)}", pool, deadline, chain))


def leave() -> None:
    """End this process, which has said goodbye, also where a transfer hangs.

    Python would wait for the threads of boto3's executors, even for those that are daemons.
    """
    if threading.active_count() > 1:
        logger.warning("a transfer hangs and is left behind")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def choose_isolation(settings: Settings) -> Isolation:
    """The level that was asked for, else the strongest the kernel offers.

    Raises:
        SettingsError: the kernel does not offer what is demanded.
    """
    reach = sandbox.probe()
    wanted = settings.worker.isolation or reach.level
    demanded = settings.worker.required_isolation
    if not reach.level.covers(wanted) or not wanted.covers(demanded):
        raise SettingsError(
            f"Isolation {max(wanted, demanded, key=lambda level: level.rank)} is demanded and this machine reaches "
            f"{reach.level}: {' '.join(reach.reasons) or 'worker.isolation is set lower.'}"
        )
    return wanted


def places(settings: Settings, machine: Machine) -> dict[str, int]:
    """Where models may live: torch device -> bytes. GPUs where there are any, else the machine's own memory.

    With `models.tensor_parallel` the GPUs that share a model are one place, and the bytes are each one's.

    Raises:
        SettingsError: `worker.device` names what this machine has not, or a model needs more GPUs than there are.
    """
    wanted = settings.worker.device
    kind = machine.profile.torch_device
    found = {f"{kind}:{at}": int(device.memory_bytes * GPU_SHARE) for at, device in enumerate(machine.devices)}
    available = min(psutil.virtual_memory().available, machine.host_memory_bytes)
    found = found or {"cpu": int(available * HOST_SHARE)}
    if wanted == "cpu":
        found = {"cpu": int(available * HOST_SHARE)}
    elif wanted not in ("auto", kind):
        if wanted not in found:
            raise SettingsError(f"worker.device is {wanted!r} and this machine offers {', '.join(found)}.")
        found = {wanted: found[wanted]}
    if settings.worker.memory_bytes:
        found = {device: min(size, settings.worker.memory_bytes) for device, size in found.items()}
    return join_devices(found, settings.models.tensor_parallel)


def model_cache(home: Home, settings: Settings) -> Path:
    return Path(settings.models.cache).expanduser() if settings.models.cache else home.hub


async def _serve(
    home: Home, settings: Settings, worker_id: str, pool: str, deadline: float | None, chain: Chain | None
) -> None:
    settings = for_pool(settings, pool)
    isolation = choose_isolation(settings)
    machine = await asyncio.to_thread(detect)
    devices = places(settings, machine)
    cache = model_cache(home, settings)
    sharing = 1 if "cpu" in devices else settings.models.tensor_parallel
    record = WorkerRecord(
        worker_id=worker_id, version=__version__, host=socket.gethostname(), pid=os.getpid(), started=time.time(),
        pool=pool, isolation=isolation, device=next(iter(devices)), deadline=deadline,
        memory_budget=sum(devices.values()) * sharing,
        model_memory=model_memory(devices, isolation, settings.models.tensor_parallel) * sharing,
    )  # fmt: skip
    accelerator = "cpu" if "cpu" in devices else machine.profile.name
    with scratch(Path(tempfile.gettempdir()), SCRATCH, f"{worker_id}-") as folder:
        redis = redis_endpoint(home, settings, Role.WORKER).client()
        agent = Agent(
            record,
            settings,
            Queue(redis, settings.limits),
            Store(store_endpoint(home, settings, Role.WORKER)),
            Residents(settings, cache, folder, devices, accelerator, isolation),
            chain,
        )
        loop = asyncio.get_running_loop()
        heard: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: agent.stop,
            signal.SIGINT: agent.stop,
            signal.SIGUSR2: partial(_warned, agent),
        }
        for number, obey in heard.items():
            loop.add_signal_handler(number, obey)
        remembering = asyncio.create_task(_remember_environment(agent))
        try:
            logger.info("serving", worker=worker_id, isolation=isolation.value, devices=devices)
            await agent.run()
        finally:
            remembering.cancel()
            await redis.aclose()
            with held(heard):
                for number in heard:
                    loop.remove_signal_handler(number)
                    signal.signal(number, signal.SIG_IGN)  # one that comes from here on must not kill what ends well


def _warned(agent: Agent) -> None:
    """Slurm's signal reaches every process of a step, as a rule early: then the clock decides, else it is obeyed."""
    record, now = agent.record, time.time()
    if record.deadline is not None:
        warning = walltime.warning_seconds(record.deadline - record.started)
        if walltime.drain_at(now, record.deadline, warning) > now:
            logger.info("warned of the walltime's end", left=round(record.deadline - now))
            return
    agent.stop(Release.WALLTIME)


def for_pool(settings: Settings, name: str) -> Settings:
    """The settings as a pool's own keys change them for its workers."""
    pool = next((pool for pool in settings.pool if pool.name == name), None)
    if pool is None:
        return settings
    changed: dict[str, object] = {"idle_seconds": pool.idle_seconds}
    if pool.isolation is not None:
        demanded = (pool.isolation, settings.worker.required_isolation)
        changed["required_isolation"] = max(demanded, key=lambda each: each.rank)
    return settings.model_copy(update={"worker": settings.worker.model_copy(update=changed)})


async def _remember_environment(agent: Agent) -> None:
    await Registry(agent.queue.redis).remember_environment(await asyncio.to_thread(environment))
