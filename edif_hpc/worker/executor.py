"""The short-lived process in which one request's code runs: forked from the zygote, prepared and locked down while it
waits, used once.

Everything that needs no request happens before it is there, the lock-down included; after that nothing in this process
is trusted any more, and only what it says on its channel, which the agent checks, leaves it.
"""

from __future__ import annotations

import itertools
import math
import os
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker import companions, prefault, sandbox
from edif_hpc.worker.channel import Channel
from edif_hpc.worker.companions import Companion
from edif_hpc.worker.contract import HostSpec, RunSpec
from edif_hpc.worker.messages import finished_message, run_spec
from edif_hpc.worker.process import PASSED_ON_PREFIXES, mapped_bytes
from edif_hpc.worker.run import Runner

CHANNEL_FD, WEIGHTS_FD = 3, 4
"""Where the sandbox puts the descriptors it keeps: the channel, then those of each model's weights."""
OPEN_FILES = 256
CPU_GRACE_SECONDS = 5
"""Wall time decides; the CPU limit is the net below it, for code that runs more threads than it was given."""


@dataclass(frozen=True)
class Preparation:
    """What the zygote knows and every executor needs."""

    spec: HostSpec
    runner: Runner
    reach: sandbox.Reach
    level: Isolation
    zygote: int
    shared: tuple[int, ...] = ()
    """The weights' descriptors: the sealed file and what lies where in it, or on a device the IPC handles."""
    pages: tuple[prefault.Span, ...] = ()
    """What every run needs."""
    readable: tuple[Path, ...] = ()
    """What a locked executor may read beside the interpreter: see `adapter_paths`."""


def adapter_paths(folders: Iterable[str]) -> tuple[Path, ...]:
    """Adapters' folders and what links in them point to: a hub cache keeps the bytes in a folder of blobs beside them,
    which a grant on the folder itself does not cover."""
    paths = [Path(folder) for folder in folders]
    links = [path.resolve() for folder in paths for path in folder.rglob("*") if path.is_symlink()]
    return (*paths, *links)


def serve(preparation: Preparation, channel: Channel, processes: int, others: Sequence[Companion] = ()) -> NoReturn:
    """Be an executor: prepare, wait, run one request, end. Never returns into the zygote's stack.

    Args:
        others: further models for the request that this one is made for.
    """
    fd = channel.detach()  # the sandbox moves it; the old object must not close somebody else's number
    code = 1
    try:
        code = _serve(preparation, fd, processes, others)
    except Exception as error:  # noqa: BLE001 - nobody above would tell the agent
        _report_broken(fd, error)
    finally:
        os._exit(code)


def _serve(preparation: Preparation, fd: int, processes: int, others: Sequence[Companion]) -> int:
    mapped = _prepare(preparation, fd, processes, others)
    channel = Channel.from_fd(CHANNEL_FD)
    channel.send({"type": "prepared", "level": preparation.level.value})
    received = channel.receive()
    if received is None:  # the agent is gone or does not need this one
        return 0
    message, (payload, result, *output) = received
    spec = run_spec(message)
    limit(spec, preparation.spec, mapped)
    channel.send({"type": "started"})
    finished = preparation.runner.run(
        spec, payload, result, lambda line: channel.send({"type": "log", "line": line}), *output
    )
    channel.send(finished_message(finished))
    return 0


def _report_broken(fd: int, error: Exception) -> None:
    """Say why this executor cannot be used. How far it came decides where its channel is by now."""
    for at in (CHANNEL_FD, fd):
        try:
            Channel.from_fd(at).send({"type": "broken", "text": f"{type(error).__name__}: {error}"})
        except OSError:  # not this one
            continue
        return


def _prepare(preparation: Preparation, fd: int, processes: int, others: Sequence[Companion]) -> int:
    """Lock down; returns the size of the address space that was there before any request."""
    spec = preparation.spec
    prefault.bring(preparation.pages)
    preparation.runner.others = {each.spec.model_key: companions.built(each) for each in others}
    _reseed()
    if spec.threads > 1:
        torch.set_num_threads(spec.threads)
    mapped = mapped_bytes()
    on_device = spec.device != "cpu"
    environment = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON_PREFIXES)}
    sandbox.enter(
        sandbox.Policy(
            level=preparation.level,
            read_only=preparation.readable,
            memory_bytes=0,  # this and the next two follow with the request's own limits
            cpu_seconds=0,
            file_bytes=0,
            processes=processes,
            open_files=OPEN_FILES,
            keep_fds=(fd, *preparation.shared, *(one for each in others for one in each.fds)),
            nice=spec.nice,
            devices=_device_nodes() if on_device else (),
            parent=preparation.zygote,
        ),
        preparation.reach,
    )
    # The environment is empty now, and tokenizers would start a thread per core in each executor.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if on_device:
        os.environ.update(environment)  # which of the devices are ours
        _attach_device(preparation, others)
    else:
        preparation.runner.sealed = _sealed(preparation, others)
    return mapped


def _sealed(preparation: Preparation, others: Sequence[Companion]) -> dict[str, tuple[int, ...]]:
    """Where the weights' descriptors are now, by key. Nobody can write to what they name."""
    numbers = itertools.count(WEIGHTS_FD)
    lent = {preparation.spec.model_key: preparation.shared, **{each.spec.model_key: each.fds for each in others}}
    return {key: tuple(next(numbers) for _ in fds) for key, fds in lent.items()}


def _device_nodes() -> tuple[Path, ...]:
    from edif_hpc.worker import device_weights

    return device_weights.nodes()


def _attach_device(preparation: Preparation, others: Sequence[Companion]) -> None:
    """After the lock-down, since the driver starts threads, which Landlock would not cover. Not run on a device yet."""
    from edif_hpc.worker import device_weights

    device_weights.attach(preparation.runner.model, WEIGHTS_FD, preparation.spec.device)
    os.close(WEIGHTS_FD)
    for number, each in enumerate(others, WEIGHTS_FD + 1):
        companions.attach(each, preparation.runner.others[each.spec.model_key], number)


def limit(spec: RunSpec, host: HostSpec, mapped: int) -> None:
    """Set the request's own limits, for good, before anything of it is read."""
    cpu = math.ceil(spec.limits.run_seconds * max(1, host.threads)) + CPU_GRACE_SECONDS
    if host.device == "cpu":  # an accelerator's driver reserves far more address space than memory
        _lower(resource.RLIMIT_AS, mapped + spec.limits.memory_bytes)
    _lower(resource.RLIMIT_CPU, cpu, cpu + CPU_GRACE_SECONDS)
    _lower(resource.RLIMIT_FSIZE, spec.limits.result_bytes)


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    hard = soft if hard is None else hard
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def _reseed() -> None:
    """Forks inherit the state of random generators; two requests must not draw the same numbers.

    Not torch.manual_seed, which also asks every kind of accelerator: 3 ms and 700 page faults.
    """
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
