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
        "submit",
    }
)
"""Names that are the client's. Only they import it: rooms of servers pass through here as well."""


def save(name: str, value: Any) -> None:
    """Keep a value under a name, as a part of a script's result.

    Next to its models, as `edif-hpc submit` has it, the script's saved values become the request's result. On your own
    machine they are written into one file, whole after each call: the one that EDIF_HPC_OUTPUT names, with its suffix
    telling the form (pt, safetensors, npz, parquet, json), else `SCRIPT.saved.pt` beside the script.

    Args:
        name: what it is called in the result; a second value of that name takes the first one's place.
        value: tensors, arrays, numbers, texts, lists and dicts of them; in a .pt file whatever torch.save takes.

    Raises:
        Misused: the name is no text, or the file's suffix is none of these.
        SavedError: the file cannot hold the value.
    """
    # Not lazy like the others: nnsight mounts a `save` on every object, modules included, which would be found first.
    import_module("edif_hpc.client._save").keep(name, value)


def __getattr__(name: str) -> Any:
    if name in CLIENT:
        return getattr(import_module("edif_hpc.client"), name)
    raise AttributeError(f"module 'edif_hpc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *CLIENT})
