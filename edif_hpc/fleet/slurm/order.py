"""What the login node tells a supervisor: a file in the home, since an argument would be pickled and a secret is none.

And what the supervisor tells the login node when it ends, in another file beside it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from pydantic import BaseModel

from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import SlurmSettings

from .names import Name

KEPT_SECONDS = 14 * 86400.0
"""Longer than any site's walltime: files of an allocation that runs must stay."""


class Order(BaseModel):
    """One allocation's task."""

    home: Path
    config: Path | None = None
    pool: Pool
    slurm: SlurmSettings
    home_tag: str
    lineage: str
    generation: int
    cache: Path
    reached_at: str = ""
    """Hosts of Redis and the store with commas between them, for NO_PROXY."""

    @property
    def name(self) -> Name:
        return Name(self.home_tag, self.pool.name, self.lineage, self.generation)


class Report(BaseModel):
    """How an allocation went, in its supervisor's words. Times are Unix seconds."""

    job_id: str
    host: str
    started: float
    ended: float | None = None
    status: int | None = None
    cause: str = ""
    restarts: int = 0
    served: bool = False
    """Whether a worker in it had a model ready."""
    longest: float = 0.0
    """The longest that a worker in it lived, in seconds: one that is started again and again is none that lives."""
    terminated: bool = False
    """Whether it was sent SIGTERM: by scancel, a preemption, or the end of the walltime."""
    successor: str = ""
    """The allocation that succeeds this one."""
    recalled: str = ""
    """The same, when it was taken back before it began."""


def folder(home: Path) -> Path:
    """Orders, reports, scripts and logs of allocations; on the file system that login and compute nodes share."""
    return home / "allocations"


def order_file(home: Path, name: Name) -> Path:
    return folder(home) / f"{name.allocation}.order.json"


def report_file(home: Path, name: Name) -> Path:
    return folder(home) / f"{name.allocation}.report.json"


def write_order(home: Home, order: Order) -> Path:
    folder(home.root).mkdir(mode=0o700, exist_ok=True)
    path = order_file(home.root, order.name)
    home.write_private(path, order.model_dump_json())
    return path


def read_order(path: Path) -> Order:
    return Order.model_validate_json(path.read_text())


def sweep(home: Path) -> None:
    """Remove what is left of allocations that nobody will ask about any more."""
    oldest = time.time() - KEPT_SECONDS
    for path in folder(home).iterdir():
        with contextlib.suppress(FileNotFoundError):  # a draft that somebody else has just put in its place
            if path.lstat().st_mtime < oldest:
                path.unlink()


def write_report(home: Path, name: Name, report: Report) -> None:
    """Whole or not at all: somebody may be reading."""
    path = report_file(home, name)
    half = path.with_suffix(".half")
    half.write_text(report.model_dump_json())
    os.replace(half, path)


def read_report(home: Path, name: Name) -> Report | None:
    try:
        return Report.model_validate_json(report_file(home, name).read_text())
    except FileNotFoundError:
        return None
