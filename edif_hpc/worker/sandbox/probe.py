"""What isolation this machine really offers."""

from __future__ import annotations

from edif_hpc.worker.sandbox.policy import Reach


def probe(*, landlock: bool = True, seccomp: bool = True) -> Reach:
    """Find out by trying, in a forked child; cached per set of arguments.

    Args:
        landlock: False treats the kernel as one without Landlock, for tests and for an admin's switch.
        seccomp: the same for seccomp.
    """
    raise NotImplementedError
