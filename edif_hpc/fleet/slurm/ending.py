"""Ending all allocations of a home, as `down` does; nothing else takes a running one away."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from . import names
from .commands import Slurm
from .listing import forget_kept
from .text import Phase, Seen

PATIENCE_SECONDS = 60.0
"""Workers hand back what they run; then Slurm cleans up after them."""
LOOK_SECONDS = 2.0


def end_allocations(home: Path, slurm: Slurm, tell: Callable[[str], None]) -> None:
    """Cancel what is pending and what runs, and wait until it has ended.

    Raises:
        ComponentError: Slurm does not say what there is; nothing was cancelled that it did not name.
    """
    forget_kept(home)
    found = _living(home, slurm)
    if not found:
        return
    tell(f"cancelling {len(found)} allocations …")
    slurm.cancel([seen.job_id for seen in found])
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := _living(home, slurm)) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)  # between two questions to Slurm, which tells nobody by itself
    if left:
        tell(f"still ending: {', '.join(seen.job_id for seen in left)}")


def _living(home: Path, slurm: Slurm) -> list[Seen]:
    return [
        seen
        for seen in slurm.allocations()
        if names.read(seen.name, home) is not None and seen.phase is not Phase.ENDED
    ]
