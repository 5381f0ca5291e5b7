"""The user's machine: connect, submit, follow, download.

Everything public is here; modules with an underscore are this room's own. nnsight and torch are imported when a block
is sent, a result is loaded, or an error of theirs is raised, and not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._batch import Batch, batch
from ._connect import connect, disconnect
from ._connection import Connection
from ._dry_run import DryRun, Saved, dry_run
from ._errors import (
    ClientError,
    CorruptPart,
    DownloadFailed,
    DryRunStopped,
    Misused,
    NotConnected,
    NotFinished,
    Refused,
    ResultExpired,
    Unreachable,
    UntrustedResult,
)
from ._events import Event
from ._loading import load_file as load
from ._request import Request, get, requests, submit
from ._warning import SurpriseWarning

if TYPE_CHECKING:
    from ._failed import RequestFailed

__all__ = [
    "Batch",
    "ClientError",
    "Connection",
    "CorruptPart",
    "DownloadFailed",
    "DryRun",
    "DryRunStopped",
    "Event",
    "Misused",
    "NotConnected",
    "NotFinished",
    "Refused",
    "Request",
    "RequestFailed",
    "ResultExpired",
    "Saved",
    "SurpriseWarning",
    "Unreachable",
    "UntrustedResult",
    "batch",
    "connect",
    "disconnect",
    "dry_run",
    "get",
    "load",
    "requests",
    "submit",
]


def __getattr__(name: str) -> Any:
    if name == "RequestFailed":  # nnsight's RemoteError too, so it imports nnsight
        return importlib.import_module("._failed", __name__).RequestFailed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
