"""What Slurm's commands print, read. Nothing here runs one, so all of it is tested on captured text.

A line of ours that cannot be read makes the whole answer unknown: a listing with holes would look like allocations that
ended, and each would be replaced. What else the same user runs need not be understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

FORMAT = "%i|%T|%r|%S|%e|%N|%j"
"""For `squeue -h -o`: id, state, reason, start, end, nodes, and the name, which may hold anything, last."""
FIELDS = FORMAT.count("|") + 1
NO_TIME = frozenset({"N/A", "NONE", "Unknown", "UNLIMITED", "INVALID", ""})


class Phase(StrEnum):
    """What an allocation's state means here; Slurm knows some thirty, and each version a few more."""

    PENDING = "pending"
    RUNNING = "running"
    ENDING = "ending"
    ENDED = "ended"


PHASES = {
    "PENDING": Phase.PENDING, "CONFIGURING": Phase.PENDING, "REQUEUED": Phase.PENDING, "REQUEUE_HOLD": Phase.PENDING,
    "REQUEUE_FED": Phase.PENDING, "SPECIAL_EXIT": Phase.PENDING, "RESV_DEL_HOLD": Phase.PENDING,
    "POWER_UP_NODE": Phase.PENDING, "EXPEDITING": Phase.PENDING,
    "RUNNING": Phase.RUNNING, "SUSPENDED": Phase.RUNNING, "STOPPED": Phase.RUNNING, "RESIZING": Phase.RUNNING,
    "SIGNALING": Phase.RUNNING, "COMPLETING": Phase.ENDING, "STAGE_OUT": Phase.ENDING,
    "BOOT_FAIL": Phase.ENDED, "CANCELLED": Phase.ENDED, "COMPLETED": Phase.ENDED, "DEADLINE": Phase.ENDED,
    "FAILED": Phase.ENDED, "NODE_FAIL": Phase.ENDED, "OUT_OF_MEMORY": Phase.ENDED, "PREEMPTED": Phase.ENDED,
    "REVOKED": Phase.ENDED, "TIMEOUT": Phase.ENDED, "LAUNCH_FAILED": Phase.ENDED, "RECONFIG_FAIL": Phase.ENDED,
}  # fmt: skip
TIME_LIMIT = 124
"""The status of `timeout` when it ended its command."""
UNSURE = (
    "timed out", "Unable to contact", "Zero Bytes", "Connection refused", "Connection reset", "Broken pipe",
    "Communication ", "Message send failure", "Message receive failure", "Header lengths", "Unexpected message",
)  # fmt: skip
"""In sbatch's words, most of them as in Slurm's src/common/slurm_errno.c: slurmctld may have taken the submission."""


class Unreadable(ValueError):
    """Slurm said something that this reader does not know; it counts as not having said anything."""


@dataclass(frozen=True)
class Seen:
    """One allocation in `squeue`.

    Args:
        state: Slurm's own word; `reason` why it is pending, or how it ended.
        start, end: Unix times, for a pending one Slurm's estimate; None where it has none.
    """

    job_id: str
    name: str
    state: str
    reason: str
    start: float | None
    end: float | None
    nodes: str

    @property
    def phase(self) -> Phase:
        return PHASES.get(self.state, Phase.RUNNING)  # a state of a newer Slurm's: it has not ended, as far as is known


def parse_squeue(text: str, is_ours: Callable[[str], bool] = lambda name: True) -> list[Seen]:
    """Read `squeue -h -o FORMAT`.

    Args:
        is_ours: by its name, whether an allocation is to be read; others are passed over.

    Raises:
        Unreadable: a line is not of that form.
    """
    lines = [_fields(line) for line in text.splitlines() if line.strip()]
    return [_seen(fields) for fields in lines if is_ours(fields[-1])]


def _fields(line: str) -> list[str]:
    fields = [field.strip() for field in line.split("|", FIELDS - 1)]
    if len(fields) != FIELDS:
        raise Unreadable(f"squeue printed {line[:200]!r}")
    return fields


def _seen(fields: list[str]) -> Seen:
    job_id, state, reason, start, end, nodes, name = fields
    if not re.fullmatch(r"\d+([_+]\S+)?", job_id) or not re.fullmatch(r"[A-Z_]+", state):
        raise Unreadable(f"squeue printed {'|'.join(fields)[:200]!r}")
    return Seen(job_id, name, state, reason.strip("()"), parse_time(start), parse_time(end), nodes)


def parse_time(text: str) -> float | None:
    """A time as Slurm prints it (local, `2026-11-24T04:00:00`), as Unix seconds; None where there is none."""
    if text in NO_TIME:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise Unreadable(f"Slurm printed {text[:100]!r} for a time") from error


def parse_submitted(text: str) -> str:
    """The id of the allocation from what `sbatch` printed, with or without --parsable.

    Raises:
        Unreadable: there is none in it: it may have been submitted all the same.
    """
    match = re.search(r"Submitted batch job (\d+)", text) or re.search(r"^(\d+)(;\S+)?$", text.strip(), re.MULTILINE)
    if not match:
        raise Unreadable(f"sbatch printed {text.strip()[:200]!r}")
    return match[1]


def is_refusal(said: str, status: int) -> bool:
    """Whether these words and this status of sbatch's mean that nothing was submitted.

    One that our time limit ended may have said something before: that it goes on trying, for example.
    """
    return status not in (0, TIME_LIMIT) and bool(said.strip()) and not any(words in said for words in UNSURE)


def first_error(text: str) -> str:
    """What a Slurm command wrote to standard error, in one line and without its own name before each."""
    lines = [re.sub(r"^\S+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines)[:500] or "it said nothing"
