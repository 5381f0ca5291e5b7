"""One rank of a model that several processes share: it holds its part of the weights and runs what every rank runs.

Ranks talk in collectives, inside the block as it runs, so each has to run the same block with the same numbers. Rank 0
is the model host, which answers the agent (see `group`); the others are processes below it, and this is their main.
Each says what came of a request as a `Report`, by which rank 0 sees whether all did the same.

    python -m edif_hpc.worker.rank CHANNEL_FD PARENT_PID NAME RANK
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edif_hpc.core.errors import EdifError, HostError
from edif_hpc.hardware.tensor_parallel import rank_devices
from edif_hpc.worker.channel import Channel, Message
from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.messages import Finished, host_spec, run_spec
from edif_hpc.worker.process import address_budget, guard_process, peak_bytes

JOIN_SECONDS = 120.0
"""For ranks that have all imported their libraries to find one another."""
LOAD_SECONDS = 3600.0
"""How far apart ranks may be when they have loaded their parts, from a disk that they share."""
CHUNK = 1024 * 1024
SAID_CHARS = 300


@dataclass(frozen=True)
class Report:
    """What came of one request on one rank.

    Args:
        digest: of the result's bytes; empty when there are none.
        collectives: how many this rank has entered since it joined.
        said: the last line of a failure.
        meta: what the run cost here.
    """

    verdict: str
    digest: str
    collectives: int
    said: str
    meta: dict[str, Any]


def own_spec(spec: HostSpec, rank: int) -> HostSpec:
    """The host's spec with the one device that is this rank's."""
    return replace(spec, device=rank_devices(spec.device, spec.ranks)[rank])


def environment(spec: HostSpec, rank: int) -> dict[str, str]:
    """What libraries read about a rank; transformers takes the number of its device from LOCAL_RANK."""
    number = own_spec(spec, rank).device.partition(":")[2]
    return {"RANK": str(rank), "LOCAL_RANK": number or str(rank), "WORLD_SIZE": str(spec.ranks)}


def import_libraries(threads: int) -> None:
    """What takes long, before others wait for this rank."""
    import torch

    torch.set_num_threads(threads)
    importlib.import_module("edif_hpc.worker.run")


def bring_up(spec: HostSpec, rank: int, meeting: str) -> tuple[Any, str]:
    """Join the others if there are any, load this rank's part, and run the first request with them.

    Args:
        spec: with this rank's own device.
        meeting: a file in a private folder through which ranks find one another.

    Returns:
        The runner, and what went wrong with the first request, which is no reason not to serve.

    Raises:
        HostError: one sentence saying what is missing, or why the ranks do not find one another.
    """
    from edif_hpc.worker import model as models
    from edif_hpc.worker.run import Runner
    from edif_hpc.worker.warmup import warm_up

    if spec.ranks > 1:
        _join(spec, rank, meeting)
    runner = Runner(models.load(spec, weights=True), spec.model_key, spec.devices, spec.adapters, spec.threads)
    runner.prepare()
    if spec.ranks > 1:
        seed(0)
    trouble = warm_up(runner)
    if spec.ranks > 1:
        _be_patient(spec.rank_seconds)
    models.settle()
    return runner, trouble


def seed(number: int) -> None:
    """Give every generator of random numbers the state that it has on the other ranks."""
    import torch

    torch.manual_seed(number)
    random.seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number % 2**32)


def report(finished: Finished, result_fd: int) -> Report:
    """What rank 0 compares, and what it says where that differs."""
    digest = _digest(result_fd, finished.size) if finished.size else ""
    return Report(finished.verdict.value, digest, _collectives(), _said(finished.description), dict(finished.meta))


def in_step(device: str) -> str:
    """Meet the other ranks once more; what is wrong if that fails, as after a collective that one did not enter."""
    import torch
    import torch.distributed as dist

    where = torch.device(device)
    try:
        dist.barrier(device_ids=[where.index or 0] if where.type != "cpu" else None)
    except RuntimeError as error:
        return _said(str(error)) or type(error).__name__
    return ""


def _said(text: str) -> str:
    """The last line of an error; what gloo and NCCL say names their own source files and tells a user nothing."""
    line = (text.strip().splitlines() or [""])[-1]
    return "it waited for another rank in vain" if re.search("gloo|NCCL", line) else line[:SAID_CHARS]


def _join(spec: HostSpec, rank: int, meeting: str) -> None:
    """Over gloo between processes on a CPU, over NCCL between GPUs; a ROCm build of torch calls its RCCL nccl, too."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device(spec.device)
    if device.type != "cpu":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=dist.FileStore(meeting, spec.ranks),  # type: ignore[attr-defined]  # torch does not list it
            rank=rank,
            world_size=spec.ranks,
            timeout=timedelta(seconds=JOIN_SECONDS),
            device_id=None if device.type == "cpu" else device,
        )
    except RuntimeError as error:
        raise HostError(f"The {spec.ranks} ranks do not find one another: {str(error)[:SAID_CHARS]}") from error
    _be_patient(LOAD_SECONDS)


def _groups() -> list[Any]:
    """Every process group there is: transformers makes some of its own, with a default of half an hour."""
    from torch.distributed import distributed_c10d

    return list(distributed_c10d._world.pg_map)


def _be_patient(seconds: float) -> None:
    """How long a collective waits for the other ranks before it fails."""
    from datetime import timedelta

    from torch.distributed import distributed_c10d

    for group in _groups():
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _collectives() -> int:
    return sum(int(group._get_sequence_number_for_group()) for group in _groups())


def _digest(fd: int, size: int) -> str:
    seen = hashlib.sha256()
    for offset in range(0, size, CHUNK):
        seen.update(os.pread(fd, min(CHUNK, size - offset), offset))
    return seen.hexdigest()


# -- ranks other than 0 -----------------------------------------------------------------------------------------------


def main(host: Channel, rank: int, meeting: str) -> None:
    received = host.receive()
    if received is None:
        return
    spec = own_spec(host_spec(received[0]), rank)
    import_libraries(spec.threads)
    host.send({"type": "joining"})
    try:
        runner, _ = bring_up(spec, rank, meeting)
    except EdifError as error:
        host.send({"type": "failed", "text": str(error)})
        return
    host.send({"type": "ready", "memory_bytes": peak_bytes()})
    while (received := host.receive()) is not None:
        message, fds = received
        if message["type"] == "check":
            host.send({"type": "checked", "trouble": in_step(spec.device)})
        else:
            host.send({"type": "ran", **asdict(_run(spec, runner, message, fds[0]))})


def _run(spec: HostSpec, runner: Any, message: Message, payload: int) -> Report:
    """Run what rank 0 runs; what is printed and what comes out is rank 0's to deliver."""
    request = run_spec({key: value for key, value in message.items() if key != "seed"})
    result = os.memfd_create("edif-rank-result", os.MFD_CLOEXEC)
    try:
        seed(message["seed"])
        with address_budget(request.limits.memory_bytes if spec.device == "cpu" else 0):
            finished = runner.run(request, payload, result, _ignore)
        return report(finished, result)
    finally:
        os.close(payload)
        os.close(result)


def _ignore(line: str) -> None:
    """What each rank prints, rank 0 prints too."""


def parse_report(message: Mapping[str, Any]) -> Report:
    return Report(**{key: value for key, value in message.items() if key != "type"})


if __name__ == "__main__":
    guard_process(int(sys.argv[2]))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # rank 0 has ended, and this rank is about to
        main(Channel.from_fd(int(sys.argv[1])), int(sys.argv[4]), sys.argv[5])
    os._exit(0)  # a process group that lost a member does not end in an orderly way
