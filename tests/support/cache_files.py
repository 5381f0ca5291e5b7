"""Model folders and cache entries made of headers and zeros, for tests that never load what they describe."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
TENSORS = {"a.weight": ("BF16", [4, 8]), "b.bias": ("F32", [8])}


def tensors_bytes(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A whole safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + WIDTHS[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def entry(cache: Path, repo_id: str = "org/name", config: dict[str, Any] | None = None, ref: str = "main") -> Path:
    """An entry of a hub cache with a config at most; its snapshot folder."""
    folder = cache / ("models--" + repo_id.replace("/", "--"))
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(COMMIT)
    if config is not None:
        (snapshot / "config.json").write_text(json.dumps(config))
    return snapshot


def model_folder(folder: Path, **files: bytes) -> Path:
    """What save_pretrained leaves: config, weights, and whatever else is named."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(tensors_bytes(TENSORS))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
