"""Where a method runs: in this process or at the service, in one session either way.

The work of a method is a module's function that takes the model and plain values and gives plain values back. Inside a
session it meets a model with weights, wherever that is, and only its small answer leaves it. The service has this
package, so the function travels by its name.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nnsight
import torch
from huggingface_hub import try_to_load_from_cache
from nnsight.tracing.tracer import _local

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import Method
from edif_hpc.core.scripts import here

VERSIONS = ("edif-hpc", "nnsight", "torch", "transformers")

Answer = dict[str, Any]
Work = Callable[..., Answer]


def answered(model: Any, work: Work, arguments: dict[str, Any], remote: bool | str) -> tuple[Answer, dict[str, Any]]:
    """What `work(model, **arguments)` gives, and what it ran on.

    Args:
        remote: as nnsight's: False here, True at the service, or a service's address.

    Raises:
        MethodError: `remote` is asked for inside a block, which runs where it runs.
    """
    if remote and _in_a_block() and not here.is_running():  # a script is where the service would bring it
        raise MethodError(
            "Inside a session or trace a method runs where that runs; leave remote= out here, and give it to the "
            "session: with model.session(remote=True)."
        )
    with model.session(remote=remote):
        pair = _with_facts(model, work, arguments)
        nnsight.save(pair)
    return pair[0], pair[1]


def _in_a_block() -> bool:
    return getattr(_local, "depth", 0) > 0


def _with_facts(model: Any, work: Work, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    answer = work(model, **arguments)
    return [answer, facts(model)]


def facts(model: Any) -> dict[str, Any]:
    """What numbers depend on, besides the prompt."""
    module = model._module
    return {
        "model": getattr(model, "repo_id", None) or type(module).__name__,
        "revision": getattr(model, "revision", None),
        "commit": getattr(module.config, "_commit_hash", None) or _commit(model),
        "dtype": str(module.dtype).removeprefix("torch."),
        "device": str(module.device.type),
        "threads": torch.get_num_threads(),
        "attention": model.attn_implementation,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
    }


def record(asked: Method, about: dict[str, Any]) -> dict[str, Any]:
    """What is kept with a result, so that it can be made again."""
    return {"method": asked.name, "parameters": asked.model_dump(mode="json"), **about}


def _commit(model: Any) -> str | None:
    """Of a model that came from this machine's cache: the name of its snapshot."""
    if not getattr(model, "repo_id", None):
        return None
    place = Path(model.repo_id)
    if not place.is_dir():
        found = try_to_load_from_cache(model.repo_id, "config.json", revision=model.revision)
        place = Path(found).parent if isinstance(found, str) else place
    return place.name if place.parent.name == "snapshots" else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
