"""When an allocation ends, how early to begin to end, and what a signal from Slurm means. Pure.

Margins are shares of the whole time, so that two minutes work as unconfigured as a day does.
"""

from __future__ import annotations

from collections.abc import Mapping

EARLY_SECONDS = 60.0
"""How much sooner than asked Slurm may send its signal."""
WARNING_SHARE, WARNING_LEAST, WARNING_MOST = 0.1, 10.0, 90.0
FLUSH_SHARE, FLUSH_LEAST, FLUSH_MOST = 0.05, 5.0, 60.0

SPARE_SHARE, SPARE_LEAST, SPARE_MOST = 0.15, 20.0, 600.0
PACE_FACTOR = 1.5
"""Queues get longer too: this much of what handovers took lately is allowed for."""


def lead_seconds(walltime: float, pace: float) -> float:
    """How long before the end a successor is asked for.

    Args:
        pace: seconds from asking until a successor is ready, as far as anybody knows.
    """
    spare = min(SPARE_MOST, max(SPARE_LEAST, walltime * SPARE_SHARE))
    return min(walltime / 2, pace * PACE_FACTOR + spare)


def warning_seconds(walltime: float) -> float:
    """How long before the end Slurm is asked for its signal."""
    return min(WARNING_MOST, max(WARNING_LEAST, walltime * WARNING_SHARE))


def flush_seconds(walltime: float) -> float:
    """What is kept free before the end for uploads and goodbyes: what runs then goes back."""
    return min(FLUSH_MOST, max(FLUSH_LEAST, walltime * FLUSH_SHARE))


def from_environment(environment: Mapping[str, str]) -> float | None:
    """The end that Slurm tells a job, as Unix seconds: newer versions do; 22.05 does not."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() and int(text) > 0 else None


def drain_at(signalled: float, deadline: float, warning: float) -> float:
    """When a signal at `signalled` means to begin to end.

    One that comes near the time at which the warning is due is that warning, perhaps a minute early, and the clock
    knows better. Any other is somebody's wish or a preemption, and is obeyed at once.
    """
    due = deadline - warning
    if due - EARLY_SECONDS <= signalled < due:
        return due
    return signalled
