"""What happens to a request, read in order from where reading stopped: one long poll after the other.

A poll that is lost costs time and no event, since each names the last event that was seen. So a gateway that
restarts, a socket that is dropped and a laptop that slept look the same from here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._connection import PATIENCE_SECONDS, WAITING_PATIENCE_SECONDS, Connection, Trouble, unheard

START = "0-0"
POLL_SECONDS = 20.0
"""Below what proxies allow a silent answer; a dead socket is noticed 10 s after it."""
STOPPABLE_SECONDS = 5.0
"""The same where somebody may want to stop it."""
TERMINAL = ("COMPLETED", "ERROR")


@dataclass(frozen=True)
class Event:
    """One status change or printed line.

    Args:
        cursor: reading goes on after it.
        at: Unix time in seconds, of the service's clock.
        status: RECEIVED, QUEUED, PROVISIONING, DEPLOYING, DISPATCHED, RUNNING, COMPLETED, ERROR; LOG is a printed line.
        description: a sentence, the printed line, or the text of the failure.
        data: on COMPLETED the link to the result.
        meta: on COMPLETED and ERROR what the run cost.
    """

    cursor: str
    at: float
    status: str
    description: str
    data: str | None
    meta: dict[str, Any] | None

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL

    @classmethod
    def read(cls, found: dict[str, Any]) -> Event:
        return cls(
            cursor=found["cursor"],
            at=float(found["at"]),
            status=found["status"],
            description=found.get("description") or "",
            data=found.get("data"),
            meta=found.get("meta"),
        )


def read(
    connection: Connection,
    request_id: str,
    after: str = START,
    *,
    wait: float = 0.0,
    trouble: Trouble = unheard,
) -> list[Event]:
    """The events after a cursor; with `wait` seconds, the answer comes when there is one.

    Raises:
        Refused: there is no such request of this user's.
        Unreachable: the service stayed away.
    """
    patience = WAITING_PATIENCE_SECONDS if wait else PATIENCE_SECONDS
    path = f"/api/requests/{request_id}/events"
    found = connection.get(path, {"after": after}, wait=wait, patience=patience, trouble=trouble)
    return [Event.read(event) for event in found["events"]]


def follow(
    connection: Connection,
    request_id: str,
    after: str = START,
    *,
    seconds: float | None = None,
    trouble: Trouble = unheard,
    stop: threading.Event | None = None,
) -> Iterator[Event]:
    """Events as they come, up to the terminal one, or until `seconds` are over or somebody sets `stop`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    longest = POLL_SECONDS if stop is None else STOPPABLE_SECONDS
    while stop is None or not stop.is_set():
        left = longest if deadline is None else min(longest, deadline - time.monotonic())
        for event in read(connection, request_id, after, wait=max(left, 0.01), trouble=trouble):
            after = event.cursor
            yield event
            if event.terminal:
                return
        if deadline is not None and time.monotonic() >= deadline:
            return
