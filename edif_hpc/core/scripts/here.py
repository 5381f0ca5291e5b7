"""Whether this process is running a script next to its models, which the worker tells the client's code in it.

Neither room knows the other; what they agree on is this: while a script runs here, `edif_hpc.save` hands its values to
the run, and there is no service to connect to, since the script is where the service would bring it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OUTPUT = "EDIF_HPC_OUTPUT"
"""The variable that names the file which a script may write its result to, whatever that is."""
NO_SERVICE = (
    "A script that runs next to its models asks no service: build the models and trace them, with or without "
    "remote=True."
)

Save = Callable[[str, Any], None]
_save: Save | None = None


@contextmanager
def running(save: Save) -> Iterator[None]:
    """While a script runs in this process."""
    global _save
    before, _save = _save, save
    try:
        yield
    finally:
        _save = before


def is_running() -> bool:
    return _save is not None


def taker() -> Save | None:
    """Who takes what the script saves; None where no service runs it."""
    return _save
