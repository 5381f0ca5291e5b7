"""Which system calls a locked process may make: the allow-list as data, for x86_64 and aarch64.

Found by tracing real requests (torch, autograd, nnsight traces, generate, torch.save: 28 calls are used) and adding
what glibc, CPython and OpenMP fall back to. What is left out on purpose, and why, is said in `seccomp`.
"""

from __future__ import annotations

from dataclasses import dataclass

ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # name: (x86_64, aarch64); None where the architecture never had the call
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70),
    "preadv2": (327, 286), "pwritev2": (328, 287), "lseek": (8, 62),
    "close": (3, 57), "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "lstat": (6, None), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "ftruncate": (77, 46), "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "fadvise64": (221, 223),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "brk": (12, 214), "msync": (26, 227), "membarrier": (324, 283), "get_mempolicy": (239, 236),
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "uname": (63, 160), "sysinfo": (99, 179), "times": (100, 153), "getrusage": (98, 165), "getcpu": (309, 168),
    "getrandom": (318, 278), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "rt_sigpending": (127, 136), "sigaltstack": (131, 132),
    "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102), "pause": (34, None),
    "exit": (60, 93), "exit_group": (231, 94),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "pipe": (22, None), "pipe2": (293, 59),
    "recvfrom": (45, 207), "recvmsg": (47, 212), "getsockopt": (55, 209), "getsockname": (51, 204),
    "getpeername": (52, 205), "shutdown": (48, 210),
    "getrlimit": (97, 163), "setrlimit": (160, 164),
}  # fmt: skip

SCRATCH_ONLY: dict[str, tuple[int | None, int | None]] = {
    # Landlock says where; without a scratch there is nowhere, and the calls go altogether
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "chdir": (80, 49), "fchdir": (81, 50),
    "umask": (95, 166),
}  # fmt: skip

ABSENT: dict[str, tuple[int, int]] = {
    # Answered with ENOSYS, as an older kernel would: glibc then takes a way that can be judged by its arguments
    "clone3": (435, 435), "openat2": (437, 437), "epoll_pwait2": (441, 441), "futex_waitv": (449, 449),
}  # fmt: skip
FIRST_UNKNOWN = 451
"""From here on every call is answered ENOSYS: newer than this list, so callers have a way round it."""

OWN_PID = -1
"""Stands for the pid of the process that loads the filter."""


@dataclass(frozen=True)
class Only:
    """The call is allowed when the low half of an argument is one of these (the kernel reads an int there too)."""

    numbers: tuple[int | None, int | None]
    argument: int
    values: tuple[int, ...]
    pointer: bool = False
    """Compare all 64 bits."""


@dataclass(frozen=True)
class Unless:
    """The call is allowed unless `argument & mask == value` for one of these pairs."""

    numbers: tuple[int | None, int | None]
    argument: int
    refused: tuple[tuple[int, int], ...]


# CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID is what pthread_create passes; musl adds
# CLONE_DETACHED. Exact values: a fork, a new namespace and a pidfd each have a bit too many or too few.
_THREAD_FLAGS = (0x3D0F00, 0x7D0F00)

# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2. Not TIOCSTI, FIOASYNC, FIOSETOWN.
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)

# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS. Not F_SETOWN and F_SETSIG,
# which have the kernel send any signal to another process of the uid; not leases, locks, F_NOTIFY, F_SETPIPE_SZ.
_HARMLESS_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032, 1034)

# PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_CAPBSET_READ, PR_GET_TIMERSLACK,
# PR_GET_NO_NEW_PRIVS, PR_SVE_GET_VL, PR_SET_VMA. Not PR_SET_PDEATHSIG (outlive the host), PR_SET_DUMPABLE,
# PR_SET_PTRACER.
_HARMLESS_PRCTLS = (2, 3, 15, 16, 21, 23, 30, 39, 51, 0x53564D41)

# ARCH_GET_FS and ARCH_GET_XCOMP_SUPP / GET_XCOMP_PERM / REQ_XCOMP_PERM: oneDNN asks for the AMX tiles on first use, and
# without them takes another kernel with other rounding than outside the sandbox.
_HARMLESS_ARCH_PRCTLS = (0x1003, 0x1021, 0x1022, 0x1023)

# Flags of open as (mask, value). O_TRUNC without writing empties a file that Landlock below ABI 3 lets one read; the
# access mode 3 (neither read nor write, for ioctl alone) passes Landlock's check of an open on any file.
_TRUNCATING_OPENS = ((0o1003, 0o1000), (0o3, 0o3))

CONDITIONAL: dict[str, Only | Unless] = {
    "clone": Only((56, 220), 0, _THREAD_FLAGS),
    "kill": Only((62, 129), 0, (OWN_PID,)),
    "tgkill": Only((234, 131), 0, (OWN_PID,)),
    "prlimit64": Only((302, 261), 0, (0, OWN_PID)),
    "sched_setaffinity": Only((203, 122), 0, (0, OWN_PID)),
    "prctl": Only((157, 167), 0, _HARMLESS_PRCTLS),
    "arch_prctl": Only((158, None), 0, _HARMLESS_ARCH_PRCTLS),
    "fcntl": Only((72, 25), 1, _HARMLESS_FCNTLS),
    "ioctl": Only((16, 29), 1, _HARMLESS_IOCTLS),
    # To the kept socket's own peer and nowhere else: an address would let a datagram socket reach any named socket.
    "sendto": Only((44, 206), 4, (0,), pointer=True),
    "open": Unless((2, None), 1, _TRUNCATING_OPENS),
    "openat": Unless((257, 56), 2, _TRUNCATING_OPENS),
}
