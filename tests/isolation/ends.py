"""Blocks that end, break, block or outgrow the process they run in.

Each gets one sentence that names the cause, or the user's own traceback, and the next request runs at once. At `none`
the process is the model host, which is killed or dies and is started again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import sys
import threading
import time

import torch

from tests.isolation.helpers import call, descriptors
from tests.isolation.table import DID, REFUSED, SPARED, case

EXITED = r"ERROR The request's code ended the process that ran it \(exit code {}\)"
CRASHED = r"ERROR The request's code crashed the process that ran it with .* \({}\)"
TIME_IS_UP = r"ERROR The request ran longer than its time limit of \d+ s and was stopped"
MEMORY = r"ERROR The request needed more memory than its limit of 512 MiB"
LOST = r"ERROR Given up after 2 attempts: .*signal 9"

# -- ends --------------------------------------------------------------------------------------------------------------


@case(EXITED.format(7), EXITED.format(7), EXITED.format(7), bare=True)
def leave_at_once(g: dict) -> object:
    os._exit(7)


@case("ERROR .*SystemExit", "ERROR .*SystemExit", "ERROR .*SystemExit", bare=True)
def leave_politely(g: dict) -> object:
    sys.exit(3)


@case("ERROR .*KeyboardInterrupt", "ERROR .*KeyboardInterrupt", "ERROR .*KeyboardInterrupt", bare=True)
def interrupt(g: dict) -> object:
    raise KeyboardInterrupt


@case(*[CRASHED.format("SIGSEGV")] * 3, bare=True)
def read_at_address_zero(g: dict) -> object:
    return ctypes.string_at(0)


@case(SPARED, *[CRASHED.format("SIGABRT")] * 2, bare=True)  # at none as the one above
def abort(g: dict) -> object:
    os.abort()


# A SIGKILL may always have come from outside, so it is tried again, and given up after as many attempts as are set.
@case(SPARED, LOST, LOST, bare=True)
def kill_oneself(g: dict) -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@case(SPARED, *[f"{CRASHED.format('SIG(SEGV|BUS)')}|ERROR .*RecursionError|{MEMORY}"] * 2, bare=True)
def recurse_for_ever(g: dict) -> object:
    sys.setrecursionlimit(2**30)

    def deeper(n: object) -> object:
        return sorted([n], key=lambda _: deeper(n))  # through C, so that it takes the real stack

    return deeper(0)


@case(*[f"{EXITED.format(1)}|ERROR .*(meddled|signal 9)"] * 3, bare=True)
def close_every_descriptor(g: dict) -> object:
    os.closerange(3, 1024)
    return "closed"


# -- time --------------------------------------------------------------------------------------------------------------


@case(SPARED, TIME_IS_UP, TIME_IS_UP, bare=True)
def loop_in_python(g: dict) -> object:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


@case(*[TIME_IS_UP] * 3, bare=True)
def loop_in_c_without_letting_go(g: dict) -> object:
    return str(7 ** (7**10))[:3]


@case(SPARED, SPARED, TIME_IS_UP, bare=True)  # seconds each: once is enough
def sleep_deaf_to_signals(g: dict) -> object:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(3600)


# -- memory, threads, descriptors --------------------------------------------------------------------------------------


@case(MEMORY, MEMORY, MEMORY, bare=True)
def take_20_gib(g: dict) -> object:
    return torch.ones(20 * 2**28)


@case(MEMORY, MEMORY, MEMORY, bare=True)
def take_20_gib_bit_by_bit(g: dict) -> object:
    kept = []
    while len(kept) < 320:
        kept.append(torch.empty(2**24))
    return len(kept)


@case(MEMORY, MEMORY, MEMORY, bare=True)
def map_20_gib(g: dict) -> object:
    return mmap.mmap(-1, 20 * 2**30)


@case(DID, DID, REFUSED)  # its pages count in no limit of this process, only the size of the file
def take_memory_as_a_file(g: dict) -> object:
    os.close(os.memfd_create("hoard"))
    return None


@case(*["OSError EFBIG|refused"] * 3)
def grow_the_payload_and_the_result(g: dict) -> object:
    import fcntl

    for fd in descriptors():
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            continue  # not one of those files
        os.pwrite(fd, b"x", 32 * 2**30)
    return None


@case(DID, "ValueError: not allowed", "ValueError: not allowed")
def raise_the_limits(g: dict) -> object:
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        soft, hard = resource.getrlimit(limit)
        if soft == hard != -1:
            resource.setrlimit(limit, (-1, -1))
        elif soft != hard:
            resource.setrlimit(limit, (hard, hard))  # the model host lives on, so it may only lower what can be raised
    return None


@case(DID, DID, REFUSED)
def become_dumpable(g: dict) -> object:
    before = call("prctl", 3, 0, 0, 0, 0)
    call("prctl", 4, 1, 0, 0, 0)
    call("prctl", 4, before, 0, 0, 0)
    return None


@case(DID, DID, REFUSED)
def outlive_the_parent(g: dict) -> object:
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # the same death signal as there is: being allowed to is the point
    return None


@case("OSError EMFILE", "OSError EMFILE", "OSError EMFILE")
def open_descriptors_without_end(g: dict) -> object:
    opened = []
    try:
        while len(opened) < 200_000:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for fd in opened:
            os.close(fd)
    return None


@case(SPARED, "RuntimeError: can't start new thread", "RuntimeError: can't start new thread")
def start_threads_without_end(g: dict) -> object:
    threading.stack_size(64 * 1024)
    stop, started = threading.Event(), []
    try:
        for _ in range(3000):
            thread = threading.Thread(target=stop.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        stop.set()
        for thread in started:
            thread.join()
    return None


# No thread is left for anybody of this user for a moment, and an honest request needs none.
@case(SPARED, "did", "did", bare=True)
def take_all_threads_and_work(g: dict) -> object:
    threading.stack_size(64 * 1024)
    for _ in range(3000):
        try:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        except RuntimeError:
            return "did"
    return "never stopped"
