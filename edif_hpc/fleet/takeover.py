"""A gateway that takes over from the one that runs: who of the two is the home's gateway, and who only drains.

The record `gateway` names who owns the port, at every moment: a successor starts under a name of its own, and takes
that record when it serves. The old one goes on under `gateway-PID` until its last socket is gone, so that `ps` shows it
and `down` ends it.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings

from . import process, state
from .process import Record
from .supervise import GATEWAY, RETRY, SUCCESSOR, SUPERVISOR, restart_file

RESTART_SECONDS = 60.0
POLL_SECONDS = 0.05


def take_over(home: Home, old: Record, address: str) -> None:
    """This process serves: make it the home's gateway, and have the old one drain."""
    if old.alive:
        process.write(home, f"{GATEWAY}-{old.pid}", old.pid, old.address)
    process.write(home, GATEWAY, os.getpid(), address)
    process.path_of(home, SUCCESSOR).unlink(missing_ok=True)
    if old.alive:
        with suppress(ProcessLookupError):
            os.kill(old.pid, signal.SIGHUP)


def is_successor(home: Home) -> bool:
    """Whether this process was started by the home's supervisor to take over."""
    record = process.living(home, SUCCESSOR)
    return record is not None and record.pid == os.getpid()


def restart(home: Home, settings: Settings) -> tuple[Record, Record]:
    """Have the supervisor replace the gateway; returns the old and the new one when the new one serves.

    Raises:
        ComponentError: nobody keeps the gateway running, its address changed, or the new one cannot start.
    """
    old = process.living(home, GATEWAY)
    keeper = process.living(home, SUPERVISOR)
    if old is None or keeper is None:
        raise ComponentError(
            f"No `edif-hpc up` keeps a gateway of {home.root} running; start it, or, for a gateway started by hand, "
            "use `edif-hpc gateway --takeover`."
        )
    url = state.gateway_url(settings)
    if old.address != url:
        raise ComponentError(
            f"The gateway is at {old.address} and the settings say {url}; to move it, run `edif-hpc down` and `up`."
        )
    asked = restart_file(home)
    asked.touch(mode=0o600)
    os.kill(keeper.pid, RETRY)
    deadline = time.monotonic() + RESTART_SECONDS
    while asked.exists():
        if time.monotonic() > deadline:
            asked.unlink(missing_ok=True)
            raise ComponentError("The new gateway does not serve yet; see `edif-hpc logs gateway` and `edif-hpc ps`.")
        time.sleep(POLL_SECONDS)  # polled with a deadline: nothing wakes us
    new = process.living(home, GATEWAY)
    if new is None or new.pid == old.pid:
        words = process.last_words(home, GATEWAY)
        raise ComponentError(
            f"The new gateway could not start, and the old one goes on; its last words: {words or 'none'}"
        )
    return old, new
