"""What isolation this machine really offers: found by doing it in a forked child, never from a version number.

A kernel may have Landlock compiled in and switched off, a container may deny the calls, a distribution may allow user
namespaces and give no rights inside them. So each child really restricts itself and then tries something forbidden.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.sandbox import identity, landlock, paths, seccomp
from edif_hpc.worker.sandbox.kernel import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    PR_SET_NO_NEW_PRIVS,
    machine,
    prctl,
    syscall,
)
from edif_hpc.worker.sandbox.policy import Reach

_CHILD_SECONDS = 5.0


@cache
def probe(*, landlock: bool = True, seccomp: bool = True) -> Reach:
    """Find out by trying, in forked children; cached per set of arguments. Takes a few milliseconds.

    Args:
        landlock: False treats the kernel as one without Landlock, for tests and for an admin's switch.
        seccomp: the same for seccomp.
    """
    if sys.platform != "linux":
        return Reach(0, False, False, False, False, False, Isolation.NONE, ("Isolation needs Linux.",))
    restricted = _in_child(_try_restrictions)
    namespaces = _in_child(_try_namespaces)
    abi = restricted.get("landlock", 0) if landlock else 0
    filters = bool(restricted.get("seccomp")) and seccomp
    no_new_privs = bool(restricted.get("no_new_privs"))
    readable = all(paths.readable_by_others(path) for path in paths.interpreter() if path.is_dir())
    change_uid = os.geteuid() == 0 and readable and bool(_in_child(_try_change_uid).get("changed"))

    reasons = []
    if not no_new_privs:
        reasons.append(
            "The kernel refuses PR_SET_NO_NEW_PRIVS, so nothing can be isolated: run requests at level none."
        )
    if not abi:
        cause = "is switched off by the caller" if not landlock else "is not offered by this kernel or container"
        reasons.append(
            f"Landlock {cause}: requests could read and write every file of this user, so the strongest level is "
            "process (needs Linux 5.13 or newer with landlock in the lsm= list)."
        )
    if not filters:
        cause = "is switched off by the caller" if not seccomp else "is not offered by this kernel or container"
        if seccomp and not _seccomp_tables():
            cause = f"has no table for the architecture {machine()}"
        reasons.append(
            f"seccomp {cause}: requests could use the network, start programs and signal processes of this user, so "
            "the strongest level is process."
        )
    if os.geteuid() == 0 and not change_uid:
        cause = (
            "the interpreter lies in a folder that other users cannot read" if not readable else "setresuid is refused"
        )
        reasons.append(
            f"Running as root without a change of uid ({cause}): requests keep uid 0 without its capabilities, and no "
            "limit on the number of threads holds."
        )
    reasons += [f"A probe failed: {found['failed']}." for found in (restricted, namespaces) if found.get("failed")]
    level = Isolation.NONE
    if no_new_privs:
        level = Isolation.LOCKED if abi and filters else Isolation.PROCESS
    return Reach(
        landlock_abi=int(abi),
        seccomp=filters,
        no_new_privs=no_new_privs,
        user_namespaces=bool(namespaces.get("user")),
        network_namespaces=bool(namespaces.get("network")),
        change_uid=change_uid,
        level=level,
        reasons=tuple(reasons),
    )


def _seccomp_tables() -> bool:
    return seccomp.supported()


def _try_restrictions(found: dict[str, Any]) -> None:
    """Restrict this child with an empty rule set and with the real filter, and see whether both hold."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    found["no_new_privs"] = True
    abi = landlock.abi()
    if abi:
        ruleset = landlock.build(abi, ())
        landlock.restrict_self(ruleset)
        found["landlock"] = abi if _refused(lambda: os.close(os.open("/", os.O_RDONLY)), errno.EACCES) else 0
    if seccomp.supported():
        before = os.getpriority(os.PRIO_PROCESS, 0) is not None
        seccomp.load(seccomp.assemble(machine(), os.getpid(), scratch=False, devices=False))
        found["seccomp"] = before and _refused(lambda: os.getpriority(os.PRIO_PROCESS, 0), errno.EPERM)


def _try_namespaces(found: dict[str, Any]) -> None:
    syscall("unshare", CLONE_NEWUSER)
    found["user"] = True
    syscall("unshare", CLONE_NEWNET)
    found["network"] = True


def _try_change_uid(found: dict[str, Any]) -> None:
    found["changed"] = identity.become_nobody(os.getpid()) == os.getuid()


def _refused(action: Callable[[], object], code: int) -> bool:
    try:
        action()
    except OSError as error:
        return error.errno == code
    return False


def _in_child(attempt: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run an attempt in a forked child and return what it found; a child that hangs is killed.

    A kernel's refusal is an answer, not an error: it lies under "refused". Anything else lies under "failed".
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. This child runs a few system calls and leaves by os._exit.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _answer(attempt, writer)
    os.close(writer)
    try:
        return _collect(reader)
    finally:
        os.close(reader)
        _reap(pid)


def _answer(attempt: Callable[[dict[str, Any]], None], writer: int) -> None:
    found: dict[str, Any] = {}
    try:
        attempt(found)
    except OSError as error:
        found["refused"] = str(error)
    except BaseException as error:  # noqa: BLE001 - the child must never return into its parent's code
        found["failed"] = f"{type(error).__name__}: {error}"
    finally:
        os.write(writer, json.dumps(found).encode())
        os._exit(0)


def _collect(reader: int) -> dict[str, Any]:
    deadline = time.monotonic() + _CHILD_SECONDS
    said = b""
    poll = select.poll()  # select() refuses descriptors above 1023
    poll.register(reader, select.POLLIN | select.POLLHUP)
    while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        said += chunk
    else:
        return {"failed": f"it did not answer within {_CHILD_SECONDS:.0f} s"}
    found = json.loads(said) if said else {"failed": "it ended without an answer"}
    return dict(found)


def _reap(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        # Somebody else in this process waits for every child (an event loop's watcher); it is gone either way.
        return
