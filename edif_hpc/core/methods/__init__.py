"""The methods that can be asked for by name, and their parameters: pydantic, without torch.

`edif_hpc.toolkit` runs them; a command line or a gateway only needs to know whether what it was given makes sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from edif_hpc.core.errors import MethodError

from ._base import Component, Method, Positions, Reduction
from .attention_patterns import AttentionPatterns
from .extract_activations import ExtractActivations
from .logit_lens import LogitLens
from .patching import ActivationPatching, AttributionPatching, Pairs
from .probe import Probe, ProbeSettings
from .steering import Steer, SteeringVector, SteerSettings
from .top_neurons import TopNeurons

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ActivationPatching,
        AttentionPatterns,
        AttributionPatching,
        ExtractActivations,
        LogitLens,
        Probe,
        Steer,
        SteeringVector,
        TopNeurons,
    )
}
"""By the name that a command line takes."""

__all__ = [
    "METHODS",
    "ActivationPatching",
    "AttentionPatterns",
    "AttributionPatching",
    "Component",
    "ExtractActivations",
    "LogitLens",
    "Method",
    "Pairs",
    "Positions",
    "Probe",
    "ProbeSettings",
    "Reduction",
    "Steer",
    "SteerSettings",
    "SteeringVector",
    "TopNeurons",
    "named",
    "parse",
]


def named(name: str) -> type[Method]:
    """The method of this name; `-` and `_` are the same.

    Raises:
        MethodError: there is none.
    """
    wanted = name.replace("_", "-")
    if wanted not in METHODS:
        near = get_close_matches(wanted, METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}."
        raise MethodError(f"There is no method {name!r}; {hint}")
    return METHODS[wanted]


def parse(name: str, parameters: Mapping[str, Any]) -> Method:
    """The parameters of the method of this name, checked; `-` and `_` are the same in both.

    Raises:
        MethodError: there is no such method or parameter, or a value cannot be used.
    """
    return named(name).checked(**{key.replace("-", "_"): value for key, value in parameters.items()})
