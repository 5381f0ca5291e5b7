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
Whole = Callable[[memoryview], None]
_save: Save | None = None
_whole: Whole | None = None


@contextmanager
def running(save: Save, whole: Whole) -> Iterator[None]:
    """While a script runs in this process.

    Args:
        save: takes one value of its result.
        whole: takes the whole result, as the file that was asked for.
    """
    global _save, _whole
    before, _save, _whole = (_save, _whole), save, whole
    try:
        yield
    finally:
        _save, _whole = before


def is_running() -> bool:
    return _save is not None


def taker() -> Save | None:
    """Who takes what the script saves; None where no service runs it."""
    return _save


def taker_of_the_whole() -> Whole | None:
    """Who takes a result that is a file of the form that was asked for; None where no service runs this."""
    return _whole
