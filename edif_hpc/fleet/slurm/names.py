"""Names of allocations: what ties a Slurm job to a home, a pool, a lineage and a generation, also when Redis forgot.

edif-3f2a91-helma-7c0d12-g4     home, pool, lineage, generation
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

PATTERN = re.compile(r"edif-(?P<home>[0-9a-f]{6})-(?P<pool>[a-z][a-z0-9-]*)-(?P<lineage>[0-9a-f]{6})-g(?P<number>\d+)")


@dataclass(frozen=True)
class Name:
    """One generation of one lineage."""

    home: str
    pool: str
    lineage: str
    generation: int = 1

    @property
    def allocation(self) -> str:
        """What Slurm calls it."""
        return f"edif-{self.home}-{self.pool}-{self.lineage}-g{self.generation}"

    @property
    def worker(self) -> str:
        """The worker that runs in it."""
        return f"worker-{self.pool}-{self.lineage}-g{self.generation}"

    @property
    def next(self) -> Name:
        return Name(self.home, self.pool, self.lineage, self.generation + 1)


def first(home: Path, pool: str) -> Name:
    """The first generation of a new lineage."""
    return Name(tag(home), pool, secrets.token_hex(3))


def read(text: str, home: Path) -> Name | None:
    """The name in an allocation's name, if it is one of this home's."""
    match = PATTERN.fullmatch(text)
    if match is None or match["home"] != tag(home):
        return None
    return Name(match["home"], match["pool"], match["lineage"], int(match["number"]))


def is_one(text: str) -> bool:
    """Whether an allocation of this name may be one of ours, of whichever home."""
    return PATTERN.fullmatch(text) is not None


def tag(home: Path) -> str:
    """Tells the allocations of one home from another's of the same user."""
    return hashlib.sha256(str(home).encode()).hexdigest()[:6]
