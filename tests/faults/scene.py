"""The processes of a service, to be killed or stopped, and the settings that have it answer soon."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from tests.delivery.scene import PATIENCE, events, pids, process_of, soon
from tests.stock.support import PROMPT
from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import Stack, running
from tests.worker.service import exists

from .flight import Sent

HEARTBEAT = 1.0
BACKOFF_SECONDS = [0.5] * 30
"""Workers die young here, again and again, and are no fault of the pool's."""
SETTINGS = """
[worker]
threads = 1
idle_seconds = 3600
heartbeat_seconds = {heartbeat}
[limits]
inline_bytes = 65536
[fleet]
workers = {workers}
backoff_seconds = {backoff}
"""
COMPONENTS = ("gateway", "fleet", "redis", "store")


@contextmanager
def service(home: Path, cache: Path, variables: dict[str, str] | None = None, *, workers: int = 1) -> Iterator[Stack]:
    settings = SETTINGS.format(heartbeat=HEARTBEAT, workers=workers, backoff=BACKOFF_SECONDS)
    with running(home, cache, "process", settings, variables=variables) as stack:
        yield stack


def reference() -> torch.Tensor:
    """The logits that every block saves, computed here."""
    from nnsight.modeling.transformers import TransformersModel

    torch.set_num_threads(1)
    model = TransformersModel(models.repo_id("gpt2"), task=models.task("gpt2"), dispatch=True)
    with model.trace(PROMPT):
        logits = model.lm_head.output[0, -1].clone().save()
    found: torch.Tensor = logits
    return found


def worker_of(stack: Stack) -> int:
    """The agent's process; there is one."""

    def there() -> list[int]:
        return [pid for name, pid in pids(stack).items() if name.startswith("worker-")]

    return int(soon(stack, there, PATIENCE, "a worker")[0])


def host_of(stack: Stack) -> int:
    """The model host's process, of the only model that is resident."""
    (found,) = psutil.Process(worker_of(stack)).children()
    return int(found.pid)


def executor_of(stack: Stack, sent: Sent) -> int:
    return process_of(stack, sent.client.accepted)


def kill(stack: Stack, name: str) -> None:
    """SIGKILL one of COMPONENTS, and wait for the one that takes its place."""
    before = pids(stack)[name]
    os.kill(before, signal.SIGKILL)
    soon(stack, lambda: pids(stack).get(name, before) != before, PATIENCE, f"another {name}")


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """A process that stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
            os.kill(pid, signal.SIGCONT)


def gone(pid: int) -> None:
    """SIGKILL a process that nobody waits for here, and see it end."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not exists(pid), PATIENCE, f"the end of {pid}")


def lost(stack: Stack, request_id: str) -> bool:
    """Whether a request went back because of its worker."""
    return any("stopped answering" in text for _, text, _ in events(stack, request_id))


@contextmanager
def given_up(stack: Stack, running: Sent) -> Iterator[None]:
    """The worker stands still until its request is somebody else's; in the end its executor has a result for it.

    The block's gate must be opened meanwhile.
    """
    executor = executor_of(stack, running)
    with paused(worker_of(stack)):
        soon(stack, lambda: lost(stack, running.client.accepted), PATIENCE, "the loss of its lease")
        yield
        eventually(lambda: not exists(executor), PATIENCE, "the end of an executor that was told nothing")
