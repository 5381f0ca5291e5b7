"""The few system calls that Python does not wrap, through ctypes, so that the sandbox needs no library beyond libc.

Every function raises OSError with the kernel's errno. Nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from functools import cache

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

CALLS = {
    "x86_64": {"seccomp": 317, "capset": 126, "unshare": 272},
    "aarch64": {"seccomp": 277, "capset": 91, "unshare": 97},
}
"""Numbers that differ between the architectures; those above 424 are the same everywhere."""

COMMON_CALLS = {
    "close_range": 436,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}


def machine() -> str:
    """The architecture in the kernel's spelling: `x86_64`, `aarch64` or something the sandbox has no tables for."""
    return platform.machine()


@cache
def libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    library.syscall.argtypes = [ctypes.c_long] * 7
    library.prctl.restype = ctypes.c_int
    library.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    library.madvise.restype = ctypes.c_int
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def syscall(name: str, *arguments: int) -> int:
    """Make one call by name; pointers are passed as their addresses."""
    number = COMMON_CALLS.get(name)
    if number is None:
        number = CALLS[machine()][name]
    padded = [*arguments, *[0] * (6 - len(arguments))]
    result = libc().syscall(number, *padded)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def prctl(option: int, *arguments: int) -> int:
    padded = [*arguments, *[0] * (4 - len(arguments))]
    result = libc().prctl(option, *padded)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
    return int(result)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilitySets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def drop_capabilities() -> None:
    """Give up every capability: matters for root that keeps its uid, and inside user namespaces."""
    header = _CapabilityHeader(0x20080522, 0)
    sets = (_CapabilitySets * 2)()
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    syscall("capset", ctypes.addressof(header), ctypes.addressof(sets))


def protect_process() -> None:
    """For agent, model host and zygote, which live with credentials or models: no tracing, no /proc entries, no core.

    Processes of the same uid can then read neither memory nor environment nor descriptors of this one; root still can.
    """
    prctl(PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
