"""Builds of this package that are broken on purpose: a proof that finds nothing wrong with them proves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.models import REPO
from tests.support.stack import passable

LUA = "edif_hpc/core/queue/lua"


def build(folder: Path, *edits: tuple[str, str, str]) -> dict[str, str]:
    """Copy the package and edit files of it; returns the environment in which the copy is imported.

    Args:
        edits: a file within the repository, what stands there, and what shall stand there instead.
    """
    shutil.copytree(REPO / "edif_hpc", folder / "edif_hpc", ignore=shutil.ignore_patterns("__pycache__"))
    for name, right, wrong in edits:
        path = folder / name
        text = path.read_text()
        assert right in text, f"{name} holds no {right!r} to be broken"
        path.write_text(text.replace(right, wrong))
    passable(folder / "edif_hpc" / "__init__.py")
    return {"PYTHONPATH": str(folder)}


def without_token_check(folder: Path) -> dict[str, str]:
    """An attempt that lost its lease may still write."""
    return build(
        folder,
        (f"{LUA}/event.lua", "if f[1] ~= token or f[3] ~= 'claimed' then return 0 end", ""),
        (f"{LUA}/finish.lua", "if f[2] == 'done' and f[7] == token then return 1 end", ""),
        (f"{LUA}/finish.lua", "if f[1] ~= token or f[2] ~= 'claimed' then return 0 end", ""),
        (f"{LUA}/release.lua", "if f[1] ~= token or f[2] ~= 'claimed' then return 'lost' end", ""),
        (f"{LUA}/renew.lua", "if f[1] == token and f[2] == 'claimed' then", "if true then"),
    )


def without_reclaim(folder: Path) -> dict[str, str]:
    """What a dead worker had claimed stays claimed."""
    return build(folder, (f"{LUA}/sweep.lua", "if now >= hold then", "if false then"))
