"""The seccomp program, run by a small interpreter on both architectures' numbers: every call and argument."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from edif_hpc.worker.sandbox import syscalls
from edif_hpc.worker.sandbox.seccomp import (
    AND,
    ARCH,
    ARGS,
    AUDIT_ARCH,
    COLUMN,
    JUMP_EQ,
    JUMP_GE,
    LOAD,
    NR,
    RET_ALLOW,
    RETURN,
    assemble,
)

pytestmark = pytest.mark.fast

PID = 4242
ALLOW, EPERM, ENOSYS = "allow", "EPERM", "ENOSYS"
ANSWERS = {RET_ALLOW: ALLOW, 0x50000 | errno.EPERM: EPERM, 0x50000 | errno.ENOSYS: ENOSYS}


def judge(
    arch: str, number: int, *arguments: int, audit: int | None = None, scratch: bool = False, devices: bool = False
) -> str:
    program = assemble(arch, PID, scratch=scratch, devices=devices)
    data = {NR: number, ARCH: AUDIT_ARCH[arch] if audit is None else audit}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        data[ARGS + 8 * index] = value & 0xFFFFFFFF
        data[ARGS + 8 * index + 4] = value >> 32 & 0xFFFFFFFF
    accumulator, at = 0, 0
    while True:
        step = program[at]
        at += 1
        if step.code == LOAD:
            accumulator = data[step.k]
        elif step.code == AND:
            accumulator &= step.k
        elif step.code == JUMP_EQ:
            at += step.true if accumulator == step.k else step.false
        elif step.code == JUMP_GE:
            at += step.true if accumulator >= step.k else step.false
        else:
            assert step.code == RETURN
            return ANSWERS[step.k]


def number(arch: str, name: str) -> int:
    rule = syscalls.CONDITIONAL[name]
    found = rule.numbers[COLUMN[arch]]
    assert found is not None
    return found


@pytest.mark.parametrize("arch", AUDIT_ARCH)
def test_exactly_the_listed_calls_pass(arch: str) -> None:
    column = COLUMN[arch]
    plain = {numbers[column] for numbers in syscalls.ALLOWED.values()} - {None}
    scratch = {numbers[column] for numbers in syscalls.SCRATCH_ONLY.values()} - {None}
    judged = {rule.numbers[column] for rule in syscalls.CONDITIONAL.values()} - {None}
    absent = {numbers[column] for numbers in syscalls.ABSENT.values()}
    assert not plain & scratch
    assert not (plain | scratch) & (judged | absent)
    for candidate in range(600):
        if candidate in judged:
            continue
        without, with_scratch = judge(arch, candidate), judge(arch, candidate, scratch=True)
        if candidate in plain:
            assert (without, with_scratch) == (ALLOW, ALLOW), candidate
        elif candidate in scratch:
            assert (without, with_scratch) == (EPERM, ALLOW), candidate
        else:
            refusal = ENOSYS if candidate in absent or candidate >= syscalls.FIRST_UNKNOWN else EPERM
            assert (without, with_scratch) == (refusal, refusal), candidate


@pytest.mark.parametrize("arch", AUDIT_ARCH)
@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("clone", (0x3D0F00,), ALLOW),
        ("clone", (0x1200011,), EPERM),  # fork
        ("clone", (0x4111,), EPERM),  # vfork
        ("clone", (0x3D0F00 | 0x10000000,), EPERM),  # with a user namespace
        ("clone", (0x3D0F00 | 0x1000,), EPERM),  # with a pidfd
        ("kill", (PID, 9), ALLOW),
        ("kill", (PID + 1, 9), EPERM),
        ("kill", (0, 9), EPERM),
        ("kill", (2**64 - 1, 9), EPERM),
        ("kill", (2**64 - PID, 9), EPERM),  # its process group
        ("tgkill", (PID, PID + 3, 10), ALLOW),
        ("tgkill", (1, 1, 10), EPERM),
        ("prlimit64", (0, 7), ALLOW),
        ("prlimit64", (1, 7), EPERM),
        ("sched_setaffinity", (0,), ALLOW),
        ("sched_setaffinity", (1,), EPERM),
        ("prctl", (15,), ALLOW),
        ("prctl", (1,), EPERM),  # PR_SET_PDEATHSIG
        ("prctl", (4, 1), EPERM),  # PR_SET_DUMPABLE
        ("prctl", (22,), EPERM),  # PR_SET_SECCOMP
        ("fcntl", (3, 2), ALLOW),
        ("fcntl", (3, 8), EPERM),  # F_SETOWN
        ("fcntl", (3, 1024), EPERM),  # F_SETLEASE
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), EPERM),  # TIOCSTI
        ("ioctl", (0, 0x1_0000_5401), ALLOW),  # the kernel, too, looks at the low half only
        ("sendto", (3, 0, 0, 0, 0), ALLOW),
        ("sendto", (3, 0, 0, 0, 0x7FFF_0000_0000), EPERM),
        ("sendto", (3, 0, 0, 0, 1), EPERM),
        ("openat", (0, 0, 0), ALLOW),
        ("openat", (0, 0, 0o1101), ALLOW),
        ("openat", (0, 0, 0o1000), EPERM),  # O_RDONLY | O_TRUNC
        ("openat", (0, 0, 0o3), EPERM),
        ("openat", (0, 0, 0o1003), EPERM),
    ],
)
def test_arguments_are_judged(arch: str, name: str, arguments: tuple[int, ...], answer: str) -> None:
    assert judge(arch, number(arch, name), *arguments) == answer


def test_only_devices_open_every_ioctl() -> None:
    assert judge("x86_64", 16, 0, 0xC0DE, devices=True) == ALLOW
    assert judge("x86_64", 16, 0, 0xC0DE) == EPERM


def test_another_architectures_table_is_no_way_round() -> None:
    assert judge("x86_64", 0, audit=0x40000003) == EPERM  # int 0x80
    assert judge("x86_64", 0x40000000) == ENOSYS  # x32
    assert judge("aarch64", 63, audit=0x40000028) == EPERM  # 32-bit arm


def _header(path: str, pattern: str) -> dict[str, int]:
    file = Path(path)
    if not file.exists():
        pytest.skip(f"{path} is not on this machine")
    return {name: int(value) for name, value in re.findall(pattern, file.read_text(), re.MULTILINE)}


@pytest.mark.parametrize(
    ("arch", "path", "pattern"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"^#define __NR_(\w+)\s+(\d+)"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", r"^#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_the_numbers_are_the_kernels(arch: str, path: str, pattern: str) -> None:
    header = _header(path, pattern)
    header.setdefault("newfstatat", header.get("fstatat", -1))
    judged = {name: rule.numbers for name, rule in syscalls.CONDITIONAL.items()}
    for name, numbers in {**syscalls.ALLOWED, **syscalls.SCRATCH_ONLY, **syscalls.ABSENT, **judged}.items():
        assert header.get(name) == numbers[COLUMN[arch]], name
