"""edif_hpc: remote nnsight experiments on clusters where nobody has root and nothing runs for ever.

The package's own face is lazy, so that importing it on a login node costs nothing and pulls in no torch: `connect`,
`submit`, `get` and the other names of `edif_hpc.client` are there once they are used. `__init__.pyi` names them for
type checkers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

CLIENT = frozenset(
    {
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
        "save",
        "submit",
    }
)
"""Names that are the client's. Only they import it: rooms of servers pass through here as well."""


def __getattr__(name: str) -> Any:
    if name in CLIENT:
        return getattr(import_module("edif_hpc.client"), name)
    raise AttributeError(f"module 'edif_hpc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *CLIENT})
