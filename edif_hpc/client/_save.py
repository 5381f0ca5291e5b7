"""What `edif_hpc.save` does: what a script leaves behind, wherever it runs.

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
from edif_hpc.core.whole import whole

from ._errors import Misused

_saved: dict[str, Any] = {}


def keep(name: str, value: Any) -> None:
    """What `edif_hpc.save` does; see there."""
    if not isinstance(name, str) or not name:
        raise Misused(f"A saved value needs a name, and {name!r} is none: edif_hpc.save('logits', logits).")
    taker = here.taker()
    if taker is not None:
        taker(name, value)
        return
    file = _file()
    if file.suffix == ".pt":
        _saved[name] = value
        with whole(file) as target:
            target.write(_torch_file())
        return
    form = file.suffix.removeprefix(".")
    if form not in files.FORMS:
        raise Misused(f"{here.OUTPUT} is {str(file)!r}; its suffix must be one of .{', .'.join(files.FORMS)}.")
    kept = plain.plain(name, value)
    files.check(name, kept, form)
    _saved[name] = kept
    try:
        with whole(file) as target:
            target.write(files.written(_saved, form))
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
