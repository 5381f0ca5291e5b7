"""edif_hpc: remote nnsight experiments on clusters where nobody has root and nothing runs for ever.

The package's own face is lazy, so that importing it on a login node costs nothing and pulls in no torch: `connect`,
`submit`, `get` and the other names of `edif_hpc.client` are there once they are used. `__init__.pyi` names them for
type checkers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        client = import_module("edif_hpc.client")
        if name in client.__all__:
            return getattr(client, name)
    raise AttributeError(f"module 'edif_hpc' has no attribute {name!r}")
