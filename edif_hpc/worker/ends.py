"""How the end of a process that ran somebody's code is to be read. Pure: decides, touches nothing.

Delivery depends on it: what the user's own code caused is told to them at once, what happened to them is tried again.
"""

from __future__ import annotations

import os
import signal

from edif_hpc.worker.contract import Verdict

CRASHES = {
    signal.SIGSEGV: "a segmentation fault",
    signal.SIGABRT: "an abort",
    signal.SIGBUS: "a bus error",
    signal.SIGFPE: "an arithmetic fault",
    signal.SIGILL: "an illegal instruction",
    signal.SIGSYS: "a system call that the sandbox forbids",
    signal.SIGTRAP: "a trap",
}


def time_limit_sentence(seconds: float) -> str:
    return (
        f"The request ran longer than its time limit of {seconds:g} s and was stopped: "
        "make it smaller, or ask for a longer limit."
    )


def cpu_limit_sentence(seconds: float) -> str:
    return (
        f"The request used more CPU time than its time limit of {seconds:g} s allows and was stopped: "
        "make it smaller, or ask for a longer limit."
    )


def memory_limit_sentence(limit_bytes: int) -> str:
    return (
        f"The request needed more memory than its limit of {size_text(limit_bytes)}: "
        "use a smaller batch, save less, or ask for a higher limit."
    )


def lost_rank_sentence(name: str, ranks: int, number: int, how: str) -> str:
    return (
        f"Rank {number} of the {ranks} that hold {name} {how or 'ended'} while the request ran: the ranks start again, "
        "so send the request again, unless its own code ends processes."
    )


def diverged_sentence(name: str, ranks: int, how: str) -> str:
    return (
        f"The {ranks} ranks that hold {name} did not all do the same ({how}): a block must not depend on what differs "
        "between processes (ranks, process ids, clocks, addresses), nor save what one rank alone has a part of, as the "
        "values inside a split module that .source shows."
    )


def size_text(size: int) -> str:
    for unit, scale in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} bytes"


def explain(status: int, run_seconds: float, ranks: int = 1) -> tuple[Verdict, str]:
    """The verdict and sentence for a process that ended with this wait status and had not finished its request."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT and ranks > 1:  # so NCCL ends, and gloo can
        return Verdict.FAILED, diverged_sentence("the model", ranks, "rank 0 was ended by what they talk through")
    if os.WIFSIGNALED(status):
        return _explain_signal(os.WTERMSIG(status), run_seconds)
    code = os.waitstatus_to_exitcode(status)
    return Verdict.FAILED, (
        f"The request's code ended the process that ran it (exit code {code}) before there was a result: "
        "remove the call that exits."
    )


def _explain_signal(number: int, run_seconds: float) -> tuple[Verdict, str]:
    if number in CRASHES:
        name = signal.Signals(number).name
        what = CRASHES[signal.Signals(number)]
        return Verdict.FAILED, (
            f"The request's code crashed the process that ran it with {what} ({name}): "
            "look for native code, ctypes or very deep recursion in the block."
        )
    if number == signal.SIGXCPU:
        return Verdict.FAILED, cpu_limit_sentence(run_seconds)
    return Verdict.LOST, (
        f"The process that ran the request was killed from outside (signal {number}); "
        "the machine may have run out of memory, or the allocation ended."
    )
