"""Resource limits of one process, hard and soft alike, so that the code inside cannot raise them.

Covered: address space, CPU time, the size of each file written, descriptors, core dumps, locked memory, message queues,
real-time and raised priority, and, for any uid but root, the number of threads and processes.

Not covered: the **sum** of files written (RLIMIT_FSIZE is per file: with a scratch on a disk, that many files times
that size; only a sized tmpfs or no scratch bounds it); memory behind descriptors, such as pipes (64 KiB each, at most
`open_files` of them) and a kept memfd (bounded by `file_bytes`); wall-clock time, which the host watches; memory
bandwidth and caches. RLIMIT_NPROC counts all tasks of the uid on the machine and does not bind root.
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path

from edif_hpc.worker.sandbox.policy import Policy

_GRACE_SECONDS = 5
"""Between SIGXCPU, which Python code may catch, and the SIGKILL that follows."""


def _lower(limit: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, but never above the hard one that is there already (that would need a privilege, and fail)."""
    hard = soft if hard is None else hard
    _, ceiling = resource.getrlimit(limit)
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(limit, (soft, hard))


def _mapped_now() -> tuple[int, int]:
    """Address space and private writable memory of this process, in bytes."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm")
    )
    size, data = (int(fields[name].split()[0]) * 1024 for name in ("VmSize", "VmData"))
    return size, data


def apply(policy: Policy) -> None:
    """Set every limit. Address space is what is mapped now plus the budget, so map the weights before.

    Each new thread of glibc reserves an arena and a stack, 72 MiB of address space, before it touches any of it. With
    devices the limit is on private writable memory instead (RLIMIT_DATA): a driver reserves more address space than the
    machine has memory. RLIMIT_DATA counts neither shared nor pinned mappings.
    """
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_RTPRIO, resource.RLIMIT_NICE):
        _lower(limit, 0)
    if not policy.devices:
        _lower(resource.RLIMIT_MEMLOCK, 0)
    _lower(resource.RLIMIT_NOFILE, policy.open_files)
    if policy.file_bytes:
        _lower(resource.RLIMIT_FSIZE, policy.file_bytes)
    if policy.processes:
        _lower(resource.RLIMIT_NPROC, policy.processes)
    if policy.cpu_seconds:
        seconds = math.ceil(time.process_time() + policy.cpu_seconds)
        _lower(resource.RLIMIT_CPU, seconds, seconds + _GRACE_SECONDS)
    if policy.memory_bytes:
        address_space, data = _mapped_now()
        if policy.devices:
            _lower(resource.RLIMIT_DATA, data + policy.memory_bytes)
        else:
            _lower(resource.RLIMIT_AS, address_space + policy.memory_bytes)
