"""Following one request to its end over HTTP, through restarts of the gateway and gaps of the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edif_hpc.core.errors import Unavailable

if TYPE_CHECKING:
    from .http import Gateway

WAIT_SECONDS = 20
"""A long poll; below the timeout of a call."""
PATIENCE_SECONDS = 120.0
"""How long a service may be away before we give up; its request goes on all the same."""
PAUSE_SECONDS = 1.0
TERMINAL = ("COMPLETED", "ERROR")


def events(gateway: Gateway, request_id: str, patience: float = PATIENCE_SECONDS) -> Iterator[dict[str, Any]]:
    """What happens to a request, each event once and in order, until its terminal one.

    Raises:
        Unavailable: the service stayed away.
        Refused: there is no such request any more.
    """
    cursor, heard = "0-0", time.monotonic()
    while True:
        try:
            found = gateway.get(f"/api/requests/{request_id}/events", after=cursor, wait=WAIT_SECONDS)
        except Unavailable:
            if time.monotonic() - heard > patience:
                raise
            time.sleep(PAUSE_SECONDS)  # nothing tells that the service is back
            continue
        heard = time.monotonic()
        for event in found["events"]:
            cursor = event["cursor"]
            yield event
            if event["status"] in TERMINAL:
                return
