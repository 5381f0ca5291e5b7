"""What this worker runs on, for nnsight.compare(): read from installed metadata, so that nothing heavy is imported."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any


def environment() -> dict[str, Any]:
    """`python_version` and `packages`, import name -> version."""
    packages: dict[str, str] = {}
    for name, distributions in packages_distributions().items():
        if name.startswith("_"):
            continue
        try:
            packages[name] = version(distributions[0])
        except PackageNotFoundError:
            continue
    return {"python_version": sys.version, "packages": packages}
