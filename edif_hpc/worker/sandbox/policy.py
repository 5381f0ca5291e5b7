"""What a caller asks of the sandbox, what the kernel offers, and how a refusal looks.

Kept apart from the code that acts, so that the zygote, the doctor and the tests can build and print these without
touching the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edif_hpc.core.errors import EdifError
from edif_hpc.core.isolation import Isolation

MIB = 1024 * 1024


class SandboxError(EdifError):
    """The level that was demanded cannot be reached here; one sentence says why and what to do."""

    code = "sandbox"


@dataclass(frozen=True)
class Reach:
    """What this machine lets a process of ours do to itself. Every field was tried, never assumed.

    Args:
        landlock_abi: the Landlock ABI that a rule set was really enforced with; 0 when there is none.
        seccomp: a filter was loaded in a child and refused a call there.
        no_new_privs: PR_SET_NO_NEW_PRIVS works (both of the above need it without root).
        user_namespaces: a child could unshare a user namespace.
        network_namespaces: a child could unshare a network namespace inside its user namespace.
        change_uid: the process may give up root for an unprivileged uid.
        level: the strongest level that `enter` can reach.
        reasons: one sentence per thing that is missing, with what it means.
    """

    landlock_abi: int
    seccomp: bool
    no_new_privs: bool
    user_namespaces: bool
    network_namespaces: bool
    change_uid: bool
    level: Isolation
    reasons: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What `edif-hpc doctor` prints: one fact a line, then one reason a line."""
        offered = {True: "yes", False: "no"}
        return [
            f"strongest isolation level: {self.level.value}",
            f"Landlock ABI: {self.landlock_abi or 'none'}",
            f"seccomp filters: {offered[self.seccomp]}",
            f"no_new_privs: {offered[self.no_new_privs]}",
            f"user namespaces: {offered[self.user_namespaces]} (not needed)",
            f"network namespaces: {offered[self.network_namespaces]} (not needed)",
            f"can change to an unprivileged uid: {offered[self.change_uid]}",
            *self.reasons,
        ]


@dataclass(frozen=True)
class Policy:
    """What `enter` does to the calling process.

    Args:
        level: the level to reach, or `SandboxError`. `none` is refused: there is nothing to enter.
        scratch: a private directory (0700, of the uid that runs) that stays writable; None leaves no writable place.
            `file_bytes` bounds each file there and **not** their sum: give None, or a directory on a sized tmpfs.
        read_only: further places to read, such as PEFT adapters; the interpreter's own are added by `enter`.
        memory_bytes: address space on top of what is mapped when `enter` is called; 0 for no limit. With devices it
            bounds private writable memory instead.
        cpu_seconds: CPU time, over all threads, on top of what was used; 0 for no limit. SIGXCPU, then SIGKILL.
        file_bytes: the size of any one file written, the kept descriptors included; 0 for no limit.
        processes: threads and processes of this *uid*, over the whole machine, at which no more may start; 0 for no
            limit. A low number fails honest requests when the same user runs other things on the node.
        open_files: the number of descriptors.
        keep_fds: descriptors to keep; they become 3, 4, 5, ... in this order.
        nice: what to add to the niceness.
        devices: accelerator nodes (/dev/nvidia*, /dev/kfd, /dev/dri) to read, write and ioctl. Never run on such a
            machine: treat as a plan.
        parent: the pid that must still be the parent once the death signal is set; 0 to skip that check. Without it
            a parent that died before `enter` leaves an orphan.
        change_uid: whether to give up root for `nobody` when running as root.
    """

    level: Isolation = Isolation.LOCKED
    scratch: Path | None = None
    read_only: tuple[Path, ...] = ()
    memory_bytes: int = 8 * 1024 * MIB
    cpu_seconds: float = 0.0
    file_bytes: int = 4 * 1024 * MIB
    processes: int = 8192
    open_files: int = 256
    keep_fds: tuple[int, ...] = ()
    nice: int = 0
    devices: tuple[Path, ...] = ()
    parent: int = 0
    change_uid: bool = True
