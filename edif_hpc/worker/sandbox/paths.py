"""Which places a locked process may read: what an interpreter, torch and their lazy imports really open.

Never a home, never /etc beyond the loader's cache and the local time zone, no file of another process. An
interpreter, a virtual environment or a package that itself lies in a home is readable there, just that folder.
"""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from functools import cache
from pathlib import Path

import edif_hpc
from edif_hpc.worker.sandbox import landlock
from edif_hpc.worker.sandbox.landlock import Rule
from edif_hpc.worker.sandbox.policy import Policy

SYSTEM = (
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/dev/urandom",
)

OWN_PROC_FILES = ("maps", "stat", "statm", "status")
"""Files, not the whole folder: that one also holds net/, which lists every connection of the machine, and mountinfo."""
OWN_PROC_LISTINGS = ("fd", "task")

PACKAGE_FOLDERS = ("site-packages", "dist-packages", "lib-dynload")


@cache
def interpreter() -> tuple[Path, ...]:
    """Standard library, installed packages and this package itself. Cached: ask once before forking."""
    found = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    found += [entry for entry in sys.path if entry.endswith((*PACKAGE_FOLDERS, ".zip"))]
    found += edif_hpc.__path__
    return tuple(dict.fromkeys(Path(path).resolve() for path in found if os.path.isabs(path)))


def readable_by_others(path: Path) -> bool:
    """Whether a uid without any rights of its own reaches this folder: else its lazy imports fail."""
    folders = [path, *path.parents]
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in folders) and bool(
        os.stat(path).st_mode & stat.S_IROTH
    )


def rules(policy: Policy, pid: int) -> list[Rule]:
    """Every grant of one locked process.

    A rule holds on to the inode it was made for. The kernel drops and remakes inodes of /proc under memory pressure,
    and then the grant is gone: these reads may fail late in a long request, never the other way round.
    """
    own = Path(f"/proc/{pid}")
    grants = [Rule(Path(path), landlock.READ) for path in SYSTEM]
    grants += [Rule(path, landlock.READ) for path in (*interpreter(), *policy.read_only)]
    grants += [Rule(own / name, landlock.READ_FILE) for name in OWN_PROC_FILES]
    grants += [Rule(own / name, landlock.READ_DIR) for name in OWN_PROC_LISTINGS]
    grants.append(Rule(Path("/dev/null"), landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE))
    grants += [Rule(path, landlock.DEVICE) for path in policy.devices]
    if policy.scratch is not None:
        grants.append(Rule(policy.scratch, landlock.WRITE))
    return grants
