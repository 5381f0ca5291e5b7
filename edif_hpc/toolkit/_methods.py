"""A method by its name, as a command line or a worker asks for it: parameters in, result out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edif_hpc.core.methods import parse

from . import attention, attribution, extraction, lens, neurons, patching, probing, steering
from ._result import Result

RUNS: dict[str, Callable[..., Result]] = {
    "activation-patching": patching.run,
    "attention-patterns": attention.run,
    "attribution-patching": attribution.run,
    "extract-activations": extraction.run,
    "logit-lens": lens.run,
    "probe": probing.run,
    "steer": steering.run,
    "steering-vector": steering.run_vector,
    "top-neurons": neurons.run,
}


def run_method(
    name: str, model: Any, parameters: Mapping[str, Any], *, remote: bool | str = False, progress: bool | None = None
) -> Result:
    """Check the parameters of the method of this name, and run it.

    Args:
        name: as in `edif_hpc.core.methods.METHODS`.
        parameters: plain values, as JSON has them.
        remote, progress: as in each method.

    Raises:
        MethodError: there is no such method, or a parameter cannot be used.
    """
    asked = parse(name, parameters)
    return RUNS[asked.name](model, asked, remote, progress)
