"""What Slurm's commands print, read. Nothing here runs one, so all of it is tested on captured text.

A line that cannot be read makes the whole answer unknown: a listing with holes would look like allocations that ended,
and each would be replaced.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

FORMAT = "%i|%T|%r|%S|%e|%N|%j"
"""For `squeue -h -o`: id, state, reason, start, end, nodes, and the name, which may hold anything, last."""
FIELDS = FORMAT.count("|") + 1
NO_TIME = frozenset({"N/A", "NONE", "Unknown", "UNLIMITED", "INVALID", ""})


class Phase(StrEnum):
    """What an allocation's state means here; Slurm knows some twenty-five."""

    PENDING = "pending"
    RUNNING = "running"
    ENDING = "ending"
    ENDED = "ended"


PHASES = {
    "PENDING": Phase.PENDING, "CONFIGURING": Phase.PENDING, "REQUEUED": Phase.PENDING, "REQUEUE_HOLD": Phase.PENDING,
    "REQUEUE_FED": Phase.PENDING, "SPECIAL_EXIT": Phase.PENDING, "RESV_DEL_HOLD": Phase.PENDING,
    "RUNNING": Phase.RUNNING, "SUSPENDED": Phase.RUNNING, "STOPPED": Phase.RUNNING, "RESIZING": Phase.RUNNING,
    "SIGNALING": Phase.RUNNING, "COMPLETING": Phase.ENDING, "STAGE_OUT": Phase.ENDING,
    "BOOT_FAIL": Phase.ENDED, "CANCELLED": Phase.ENDED, "COMPLETED": Phase.ENDED, "DEADLINE": Phase.ENDED,
    "FAILED": Phase.ENDED, "NODE_FAIL": Phase.ENDED, "OUT_OF_MEMORY": Phase.ENDED, "PREEMPTED": Phase.ENDED,
    "REVOKED": Phase.ENDED, "TIMEOUT": Phase.ENDED,
}  # fmt: skip


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
        return PHASES[self.state]


def parse_squeue(text: str) -> list[Seen]:
    """Read `squeue -h -o FORMAT`.

    Raises:
        Unreadable: a line is not of that form, or names a state that no Slurm is known to have.
    """
    return [_seen(line) for line in text.splitlines() if line.strip()]


def _seen(line: str) -> Seen:
    fields = [field.strip() for field in line.split("|", FIELDS - 1)]
    if len(fields) != FIELDS or not re.fullmatch(r"\d+(_\S+)?", fields[0]) or fields[1] not in PHASES:
        raise Unreadable(f"squeue printed {line[:200]!r}")
    job_id, state, reason, start, end, nodes, name = fields
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


def first_error(text: str) -> str:
    """What a Slurm command wrote to standard error, in one line and without its own name before each."""
    lines = [re.sub(r"^\S+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines)[:500] or "it said nothing"
