"""The host's memory and cores as this process may use them: less than the machine has, inside an allocation.

Slurm and containers limit memory through cgroups, of either version; every level up to the root counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60
"""Bytes. Version 1 writes "no limit" as a number near 2**63."""


def cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_bytes(root: Path = Path("/")) -> int:
    """Total memory, or the tightest cgroup limit below it."""
    limits = [limit for limit in cgroup_limits(root) if limit < UNLIMITED]
    return min([parse_meminfo(_read(root / "proc/meminfo")), *limits])


def parse_meminfo(text: str) -> int:
    """MemTotal of /proc/meminfo, in bytes; 0 where there is none."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemTotal":
            return int(rest.split()[0]) * 1024
    return 0


def cgroup_limits(root: Path = Path("/")) -> Iterator[int]:
    """The memory limit of every cgroup this process is in, from its own up to the root."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = mount / path.strip("/")
        # Inside a container the path may be the host's and not exist here: its parents up to the mount still count.
        for place in (folder, *folder.parents):
            limit = _read(place / name).strip()
            if limit.isdigit():
                yield int(limit)
            if place == mount:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
