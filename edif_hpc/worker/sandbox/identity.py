"""Giving up root. An ordinary user has nothing to give up here and keeps its uid and its supplementary groups."""

from __future__ import annotations

import os

from edif_hpc.worker.sandbox.kernel import drop_capabilities

NOBODY = 65534
_SPARE_BASE = 2_000_000_000
"""Above the ranges that distributions, systemd and subuid files hand out: nobody owns a file or a process there."""


def spare_uid(pid: int) -> int:
    """A uid of its own for each executor, so that two of them cannot signal or trace each other, or share NPROC."""
    return _SPARE_BASE + pid


def become_nobody(pid: int) -> int:
    """Change to a spare uid, or to `nobody` where the user namespace maps no such uid; return it.

    The kernel clears PR_SET_PDEATHSIG and sets the process undumpable when the uid changes: set the death signal after.
    """
    os.setgroups([])
    uid = spare_uid(pid)
    try:
        os.setresgid(uid, uid, uid)
    except OSError:
        # EINVAL: not mapped in this user namespace. Nothing was changed yet.
        uid = NOBODY
        os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    return uid


def shed(change_uid: bool, pid: int) -> None:
    """Give up root if told to, and every capability in any case."""
    if change_uid:
        become_nobody(pid)
    drop_capabilities()
