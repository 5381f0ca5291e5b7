"""seccomp: the part of the sandbox that knows system calls. Assembles the allow-list into BPF and loads it.

What is not on the list in `syscalls` answers EPERM, which user code sees as a PermissionError; it never kills. So
there is no exec, no fork (only threads), no socket, socketpair, connect or bind, no sendmsg (which passes
descriptors), no signal, priority, limit or affinity of another process, no ptrace or process_vm_*, no pidfd, no
unshare, setns or mount, no io_uring, bpf, keyctl, userfaultfd, perf, fanotify or inotify, no file handles, device
nodes, chmod, chown, utimes, xattr or locks, no memfd_create (its pages escape RLIMIT_AS), no System V IPC or message
queues, no setsid (it would leave the session that the host kills), and no prctl that makes it dumpable again or lets
it outlive the host.

Honest code that fails because of it: asyncio (its loop needs a socketpair), subprocess, multiprocessing, sqlite3 on
disk.

Not covered: anything a permitted call does on a descriptor that was kept; bugs in the kernel behind permitted calls
(about 110 of 450 remain reachable); side channels. On kernels before 5.16 a filter also switches on the speculative
store bypass mitigation, which is left on: user code may be native.

aarch64 was checked by interpreting the program, never run on such a machine.
"""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass

from edif_hpc.worker.sandbox import syscalls
from edif_hpc.worker.sandbox.kernel import machine, syscall

SET_MODE_FILTER = 1
FLAG_TSYNC = 1

RET_ALLOW = 0x7FFF0000
RET_ERRNO = 0x00050000

LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_EQ = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_GE = 0x35  # BPF_JMP | BPF_JGE | BPF_K
AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K

NR = 0
ARCH = 4
ARGS = 16

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMN = {"x86_64": 0, "aarch64": 1}


@dataclass(frozen=True)
class Instruction:
    code: int
    k: int
    true: int = 0
    false: int = 0


_ALLOW = Instruction(RETURN, RET_ALLOW)
_EPERM = Instruction(RETURN, RET_ERRNO | errno.EPERM)
_ENOSYS = Instruction(RETURN, RET_ERRNO | errno.ENOSYS)


def _judge(rule: syscalls.Only | syscalls.Unless, pid: int) -> list[Instruction]:
    """The part of the program that looks at an argument and returns."""
    low = ARGS + 8 * rule.argument
    block: list[Instruction] = []
    if isinstance(rule, syscalls.Unless):
        for mask, value in rule.refused:
            block += [Instruction(LOAD, low), Instruction(AND, mask), Instruction(JUMP_EQ, value, 0, 1), _EPERM]
        return [*block, _ALLOW]
    if rule.pointer:
        block += [Instruction(LOAD, low + 4), Instruction(JUMP_EQ, 0, 1, 0), _EPERM]
    block.append(Instruction(LOAD, low))
    for value in rule.values:
        block += [Instruction(JUMP_EQ, pid if value == syscalls.OWN_PID else value, 0, 1), _ALLOW]
    return [*block, _EPERM]


def assemble(arch: str, pid: int, *, scratch: bool, devices: bool) -> list[Instruction]:
    """The filter for one process, as a pure function.

    A call made through another architecture's table (32-bit on x86_64) is refused outright; x32 numbers are beyond the
    list and so unknown.

    Args:
        arch: `x86_64` or `aarch64`.
        pid: the process that will load it, the only one that it may signal.
        scratch: whether there is a place to make and remove files.
        devices: whether any ioctl is allowed (Landlock then says on which device, from ABI 5).
    """
    column = COLUMN[arch]
    program = [Instruction(LOAD, ARCH), Instruction(JUMP_EQ, AUDIT_ARCH[arch], 1, 0), _EPERM, Instruction(LOAD, NR)]
    plain = dict(syscalls.ALLOWED)
    if scratch:
        plain |= syscalls.SCRATCH_ONLY
    for numbers in plain.values():
        number = numbers[column]
        if number is not None:
            program += [Instruction(JUMP_EQ, number, 0, 1), _ALLOW]
    for name, rule in syscalls.CONDITIONAL.items():
        number = rule.numbers[column]
        if number is None:
            continue
        block = [_ALLOW] if devices and name == "ioctl" else _judge(rule, pid)
        program += [Instruction(JUMP_EQ, number, 0, len(block)), *block]
    for absent in syscalls.ABSENT.values():
        program += [Instruction(JUMP_EQ, absent[column], 0, 1), _ENOSYS]
    return [*program, Instruction(JUMP_GE, syscalls.FIRST_UNKNOWN, 0, 1), _ENOSYS, _EPERM]


class _SockFilter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _SockFprog(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def supported() -> bool:
    """Whether there are tables for this machine's architecture."""
    return machine() in AUDIT_ARCH


def load(program: list[Instruction]) -> None:
    """Put the filter on every thread of this process. Needs NO_NEW_PRIVS."""
    filters = (_SockFilter * len(program))(*[_SockFilter(i.code, i.true, i.false, i.k) for i in program])
    fprog = _SockFprog(len(program), ctypes.addressof(filters))
    stuck = syscall("seccomp", SET_MODE_FILTER, FLAG_TSYNC, ctypes.addressof(fprog))
    if stuck:
        raise OSError(errno.EBUSY, f"seccomp: thread {stuck} could not be given the filter")
