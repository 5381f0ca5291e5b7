"""A second model of the same name in one script: a module of its own, over weights that nobody has touched.

At home each construction loads its own weights, so that one can be changed and compared with the other. Here the first
is the resident one; the next maps the host's sealed weights privately once more, which takes memory only where they are
changed, but counts with its whole size. Without such a file, at level `none` and on devices, it gets a copy.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch

from edif_hpc.core.errors import HostError
from edif_hpc.worker import weights
from edif_hpc.worker.failures import Refusal


def module(resident: Any, sealed: tuple[int, ...]) -> torch.nn.Module:
    """Build it.

    Args:
        resident: the nnsight model that the script has already.
        sealed: the descriptors of its weights and of what lies where in them; none: its tensors are copied.

    Raises:
        Refusal: its weights fit into no new module.
    """
    gc.collect()  # an earlier one that the script let go of, whose modules and hooks hold each other
    known = resident._module
    config = copy.deepcopy(known.config)
    try:
        with torch.device("meta"):
            made: torch.nn.Module = type(known)._from_config(config, dtype=known.dtype)
        if sealed:
            weights.attach_module(made, *sealed)
        else:
            _copy(known, made)
    except (HostError, AttributeError) as error:
        raise Refusal(
            f"A second {resident.repo_id} cannot be built beside the first here ({error}): build it once, and the one "
            "without an adapter first."
        ) from error
    made.generation_config = copy.deepcopy(known.generation_config)
    return made.requires_grad_(False).eval()


def _copy(known: torch.nn.Module, made: torch.nn.Module) -> None:
    slots, tensors = weights.unique_tensors(known)
    weights.check_same_tree(made, slots)
    parameters = {number for (_, kind, _), number in slots.items() if kind == weights.PARAMETER}
    weights.place(made, slots, [tensor.detach().clone() for tensor in tensors], parameters)
