"""This package travels by its name, also from a checkout.

Before its first request nnsight looks for modules that lie outside site-packages, and from then on sends their
functions and classes as source, since a server could not import them. Run from a checkout or an editable installation
this package is among them, but every worker has it, and a result that comes back must be of the class that the caller
knows.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = "edif_hpc"


def travel_by_name() -> None:
    """Have nnsight look now, and take this package off its list. Nothing is done where it is installed."""
    if {"site-packages", "dist-packages"} & set(Path(__file__).parts):
        return
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
    from nnsight.ndif import pull_env

    pull_env()
    _PICKLE_BY_VALUE_MODULES.discard(PACKAGE)
