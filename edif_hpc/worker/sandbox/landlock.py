"""Landlock: the part of the sandbox that knows paths. A process gives itself a rule set that it can never widen.

Covered, when the kernel's ABI offers it: every right on files and directories that is not granted by a rule; moving
and linking across directories (ABI 2); truncation (3); TCP bind and connect (4); ioctl on devices (5); abstract unix
sockets and signals to processes outside (6). Tracing anything outside is refused at every ABI, and with it most of
/proc/OTHER-PID.

Not covered by any ABI: stat, access, readlink and chdir (so the existence, size, times and owner of any file that the
uid may look up are visible), chmod, chown, utimes, extended attributes, file locks, UDP and named unix sockets,
descriptors that were open before, System V IPC. Except for the first group, `seccomp` refuses those calls.
Below ABI 3, opening a file read-only with O_TRUNC empties it; `seccomp` refuses that too.

Needed: CONFIG_SECURITY_LANDLOCK, and landlock in the kernel's lsm= list. An outer container may deny the calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.worker.sandbox.kernel import syscall

CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

READ = READ_FILE | READ_DIR
"""No EXECUTE: mapping a shared library needs none, running a file does."""
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE
"""For scratch. No links, sockets, fifos or device nodes: whoever clears it up afterwards may meet only files."""
DEVICE = READ | WRITE_FILE | IOCTL_DEV
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

TCP_BIND = 1 << 0
TCP_CONNECT = 1 << 1
SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
SCOPE_SIGNAL = 1 << 1


@dataclass(frozen=True)
class Rule:
    path: Path
    rights: int


class _RulesetAttr(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # Python 3.14 asks for the layout to be named wherever _pack_ is
    _fields_ = (("rights", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The ABI that the kernel announces, 0 when it has no Landlock, has it switched off, or may not be asked."""
    try:
        return syscall("landlock_create_ruleset", 0, 0, CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            return 0
        raise


def handled_fs(version: int) -> int:
    """Every file system right that this ABI can take away."""
    newest = {1: MAKE_SYM, 2: REFER, 3: TRUNCATE, 4: TRUNCATE}.get(version, IOCTL_DEV)
    return (newest << 1) - 1


def build(version: int, rules: Iterable[Rule]) -> int:
    """Make the rule set and return its descriptor. Do it while the paths are still reachable: before a change of uid.

    A path that is not there grants nothing and is passed over.
    """
    handled = handled_fs(version)
    attr = _RulesetAttr(handled)
    if version >= 4:
        attr.net = TCP_BIND | TCP_CONNECT
    if version >= 6:
        attr.scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = syscall("landlock_create_ruleset", ctypes.addressof(attr), size, 0)
    for rule in rules:
        try:
            parent = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # Unreadable for us now means unreadable for the request too, which is the safe direction.
            continue
        try:
            rights = rule.rights & handled
            if not stat.S_ISDIR(os.fstat(parent).st_mode):
                rights &= FILE_RIGHTS
            if rights:
                beneath = _PathBeneathAttr(rights, parent)
                syscall("landlock_add_rule", ruleset, RULE_PATH_BENEATH, ctypes.addressof(beneath), 0)
        finally:
            os.close(parent)
    return ruleset


def restrict_self(ruleset: int) -> None:
    """Apply it to the calling **thread** and all that it starts later: call while there is just one."""
    syscall("landlock_restrict_self", ruleset, 0)
