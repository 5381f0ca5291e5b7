"""The header of a safetensors file: what tensors it holds, read without torch and without the tensors.

The format: 8 bytes with the header's length (little-endian), the header as JSON, the data. Offsets count from the end
of the header. What this module must not know: which model a file belongs to, beyond its name in a sentence.
"""

from __future__ import annotations

import hashlib
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


def digest_tensors(path: Path) -> str:
    """A sha256 of the tensors in the order of their names: equal weights have equal digests, however laid out."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
        for name in sorted(header.keys() - {"__metadata__"}):
            tensor = header[name]
            start, end = tensor["data_offsets"]
            digest.update(f"{name}\0{tensor['dtype']}\0{tensor['shape']}\n".encode())
            handle.seek(8 + length + start)
            digest.update(handle.read(end - start))
    return digest.hexdigest()
