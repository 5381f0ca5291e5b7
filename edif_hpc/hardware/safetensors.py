"""The header of a safetensors file: what tensors it holds, read without torch and without the tensors.

The format: 8 bytes with the header's length (little-endian), the header as JSON, the data. Offsets count from the end
of the header. What this module must not know: which model a file belongs to, beyond its name in a sentence.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edif_hpc.core.errors import ModelError

LARGEST_HEADER = 100_000_000
"""Bytes: the limit of the reference implementation."""


@dataclass(frozen=True)
class Shard:
    """One file: elements by stored type ("BF16"), and the bytes of all tensors."""

    counts: dict[str, int]
    data_bytes: int


def read_shard(path: Path, model: str) -> Shard:
    """Read one file's header.

    Raises:
        ModelError: the file is damaged or was not written to its end.
    """
    try:
        size = os.stat(path).st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError("header longer than the file")
            header = json.loads(handle.read(length))
        shard = count_tensors(header)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
        raise ModelError(f"The weight file {path.name} of {model!r} is damaged; pull the model again.") from None
    if 8 + length + shard.data_bytes > size:
        raise ModelError(f"The weight file {path.name} of {model!r} is cut short; pull the model again.")
    return shard


def count_tensors(header: dict[str, Any]) -> Shard:
    """Add up what a header lists."""
    counts: dict[str, int] = {}
    end = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        shape = tensor["shape"]
        if any(not isinstance(width, int) or width < 0 for width in shape):
            raise ValueError("a shape that is not one")
        counts[str(tensor["dtype"])] = counts.get(str(tensor["dtype"]), 0) + math.prod(shape)
        end = max(end, int(tensor["data_offsets"][1]))
    return Shard(counts, end)
