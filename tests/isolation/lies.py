"""Lies told on the executor's own channel, and answers, errors and prints made to hurt whoever handles them.

What an executor says is a stranger's word. A block may spoil its own request in any way it likes, and nothing else:
not the agent, not the next request, and no process may stay behind with nobody watching it.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import stat
import struct
import sys
import time

from tests.isolation.ends import EXITED, TIME_IS_UP
from tests.isolation.helpers import descriptors
from tests.isolation.table import REFUSED, SPARED, case

MEDDLED = "ERROR The request's code meddled with its own executor"
ENDED = "|".join([MEDDLED, EXITED.format(1), "ERROR .*(signal 9|ended)"])


def tell(message: bytes, times: int = 1) -> None:
    """Write a message into everything that is open, the channel to the agent included."""
    for fd in descriptors():
        try:
            for _ in range(times):
                os.write(fd, message)
        except OSError:
            continue


def say(**message: object) -> None:
    tell(json.dumps(message).encode())


def only_watched_processes(ground: object, level: str, said: str) -> None:
    """Nothing but the spares that wait, within a moment: one that nobody watches would live for ever."""
    from tests.support.servers import eventually

    spares = 0 if level == "none" else SPARES
    eventually(lambda: len(ground.executors()) <= spares, 20, "the end of executors that nobody watches")


SPARES = 1
"""As the service under test is set."""


# -- forged ends -------------------------------------------------------------------------------------------------------


@case(SPARED, "ERROR a forged end", "ERROR a forged end", bare=True, after=only_watched_processes)
def forge_an_error(g: dict) -> object:
    say(type="finished", verdict="failed", description="a forged end", size=0, meta={})
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True, after=only_watched_processes)
def forge_a_result_larger_than_its_file(g: dict) -> object:
    say(type="finished", verdict="completed", description="", size=2**40, meta={})
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True, after=only_watched_processes)
def forge_a_negative_size(g: dict) -> object:
    say(type="finished", verdict="completed", description="", size=-1, meta={})
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True)
def forge_measurements(g: dict) -> object:
    tell(b'{"type":"finished","verdict":"failed","description":"x","size":0,"meta":{"runtime":NaN}}')
    time.sleep(3600)


@case(SPARED, *["ERROR .*nobody should watch me now"] * 2, bare=True, after=only_watched_processes)
def claim_to_be_broken_and_live_on(g: dict) -> object:
    say(type="broken", text="nobody should watch me now")
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True, after=only_watched_processes)
def forge_another_beginning(g: dict) -> object:
    say(type="started")
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True)
def claim_a_level(g: dict) -> object:
    say(type="prepared", level="locked")
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True)
def write_noise(g: dict) -> object:
    tell(b"\xff\x00noise")
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True)
def nest_too_deep(g: dict) -> object:
    tell(b"[" * 100_000)
    time.sleep(3600)


@case(SPARED, MEDDLED, MEDDLED, bare=True)
def write_too_long_a_message(g: dict) -> object:
    tell(b'{"type":"log","line":"' + b"x" * 150_000 + b'"}')
    time.sleep(3600)


# -- texts that are no text --------------------------------------------------------------------------------------------


@case(SPARED, r"ERROR half a \S+ pair", r"ERROR half a \S+ pair", bare=True)
def forge_an_error_with_half_a_surrogate_pair(g: dict) -> object:
    tell(b'{"type":"log","line":"half \\ud800 a line"}')
    tell(b'{"type":"finished","verdict":"failed","description":"half a \\ud800 pair","size":0,"meta":{}}')
    time.sleep(3600)


@case("passed", "passed", "passed", bare=True)
def print_half_a_surrogate_pair(g: dict) -> object:
    print("half a \ud800 pair", "\0", "\x1b[2J")
    return "passed"


@case(*[r"ERROR .*ValueError: half a \S+ pair"] * 3, bare=True)
def raise_half_a_surrogate_pair(g: dict) -> object:
    raise ValueError("half a \ud800 pair")


@case("passed", "passed", "passed", bare=True)
def print_without_end(g: dict) -> object:
    for n in range(200_000):
        print(n)
    print("x" * (50 * 2**20))
    return "passed"


@case(SPARED, "passed", "passed", bare=True)
def forge_log_lines_without_end(g: dict) -> object:
    tell(b'{"type":"log","line":"forged"}', times=20_000)
    return "passed"


@case(SPARED, MEDDLED, f"{MEDDLED}|{REFUSED}")
def hand_the_agent_descriptors(g: dict) -> object:
    null = os.open("/dev/null", os.O_RDONLY)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", null))]
    for fd in descriptors():
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            socket.socket(fileno=os.dup(fd)).sendmsg([b'{"type":"log","line":"x"}'], rights)
    time.sleep(3600)


# -- the file of the result --------------------------------------------------------------------------------------------


@case(SPARED, MEDDLED, MEDDLED, bare=True)
def keep_the_result_writable(g: dict) -> object:
    kept = sys.modules["kept"] = []  # what the block holds itself is let go before the result is written
    for fd in descriptors():
        try:
            kept.append(mmap.mmap(fd, 4096))
        except (OSError, ValueError):
            continue
    return len(kept)


@case(SPARED, f"{MEDDLED}|ERROR .*PermissionError", f"{MEDDLED}|ERROR .*PermissionError", bare=True)
def empty_the_result(g: dict) -> object:
    for fd in descriptors():
        try:
            os.ftruncate(fd, 0)
        except OSError:
            continue
    return "emptied"


# -- a channel that is shut --------------------------------------------------------------------------------------------


@case(SPARED, f"{TIME_IS_UP}|{ENDED}", f"{TIME_IS_UP}|{ENDED}", bare=True, after=only_watched_processes)
def shut_the_channel(g: dict) -> object:
    for fd in descriptors():
        try:
            socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
    time.sleep(3600)


@case(SPARED, EXITED.format(3), EXITED.format(3), bare=True)
def say_nothing_at_all(g: dict) -> object:
    tell(b"")  # an empty message reads as the end of a channel
    os._exit(3)


# -- errors that misbehave ---------------------------------------------------------------------------------------------


@case(*["ERROR .*Mute"] * 3, bare=True)
def raise_what_cannot_be_printed(g: dict) -> object:
    class Mute(RuntimeError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    raise Mute


@case(*[r"ERROR .{1000,20000}$"] * 3, bare=True)
def raise_100_mb(g: dict) -> object:
    raise ValueError("x" * (100 * 2**20))


@case(SPARED, SPARED, TIME_IS_UP, bare=True)  # seconds each: once is enough
def raise_what_takes_for_ever_to_print(g: dict) -> object:
    class Slow(ValueError):
        def __str__(self) -> str:
            time.sleep(3600)
            return "late"

    raise Slow


@case(*["ERROR .*round"] * 3, bare=True)
def raise_in_a_circle(g: dict) -> object:
    first, second = ValueError("round"), ValueError("and round")
    first.__cause__, second.__cause__ = second, first
    raise first


@case(*["ERROR .*a traceback that is none"] * 3, bare=True)
def raise_with_a_false_traceback(g: dict) -> object:
    class Odd(ValueError):
        __intervention_tb__ = "no traceback"

    raise Odd("a traceback that is none")


@case(*[r"ERROR (?!.*edif_hpc[/\\.]worker)(?!.*nnsight[/\\]intervention).*Error"] * 3, bare=True)
def show_the_services_frames(g: dict) -> object:
    import torch

    return torch.zeros(2) @ torch.zeros(3)


# -- results that misbehave --------------------------------------------------------------------------------------------


@case(*[r"ERROR The saved values take more than the limit"] * 3, bare=True)
def save_too_much(g: dict) -> object:
    import torch

    return torch.rand(40 * 2**18)


@case(*[r"ERROR The saved value '\w+' cannot be sent back|ERROR .*ZeroDivisionError"] * 3, bare=True)
def save_what_cannot_be_packed(g: dict) -> object:
    class Spiteful:
        def __reduce__(self) -> object:
            return 1 // 0

    return Spiteful()


@case(SPARED, SPARED, TIME_IS_UP, bare=True)  # seconds each: once is enough
def save_what_takes_for_ever_to_pack(g: dict) -> object:
    class Slow:
        def __reduce__(self) -> object:
            time.sleep(3600)

    return Slow()
