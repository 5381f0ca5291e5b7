"""`save`: what a script leaves behind, wherever it runs.

Next to its models, as `edif-hpc submit` has it, the values become the request's result. On its author's own machine the
same line writes them into one file beside the script, whole after each call, so that a crash later loses none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from edif_hpc.core.errors import SavedError
from edif_hpc.core.scripts import files, here, plain

from ._errors import Misused

_saved: dict[str, Any] = {}


def save(name: str, value: Any) -> None:
    """Keep a value under a name, as a part of the script's result.

    Args:
        name: what it is called in the result; a second value of that name takes the first one's place.
        value: tensors, arrays, numbers, texts, lists and dicts of them; in a .pt file whatever torch.save takes.

    On your own machine the file is the one that EDIF_HPC_OUTPUT names, with its suffix telling the form (pt,
    safetensors, npz, parquet, json), else `SCRIPT.saved.pt` beside the script.

    Raises:
        Misused: the name is no text, or the file's suffix is none of these.
        SavedError: the file cannot hold the value.
    """
    if not isinstance(name, str) or not name:
        raise Misused(f"A saved value needs a name, and {name!r} is none: edif_hpc.save('logits', logits).")
    taker = here.taker()
    if taker is not None:
        taker(name, value)
        return
    file = _file()
    if file.suffix == ".pt":
        _saved[name] = value
        _write(file, _torch_file())
        return
    form = file.suffix.removeprefix(".")
    if form not in files.FORMS:
        raise Misused(f"{here.OUTPUT} is {str(file)!r}; its suffix must be one of .{', .'.join(files.FORMS)}.")
    kept = plain.plain(name, value)
    files.check(name, kept, form)
    _saved[name] = kept
    try:
        _write(file, files.written(_saved, form))
    except SavedError:
        del _saved[name]
        raise


def _file() -> Path:
    if named := os.environ.get(here.OUTPUT):
        return Path(named)
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0].endswith(".py") else Path("notebook")
    return script.with_name(f"{script.stem}.saved.pt")


def _torch_file() -> bytes:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(_saved, buffer)
    return buffer.getvalue()


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_bytes(data)
    draft.replace(file)
