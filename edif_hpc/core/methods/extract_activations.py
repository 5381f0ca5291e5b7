"""Parameters of extract-activations: which numbers are taken out of the model, and what is left of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ._base import OnPositions, Reduction


class ExtractActivations(OnPositions):
    name = "extract-activations"
    gives = "Activations of layers at tokens, or their mean or maximum."

    component: Literal["residual", "attention", "mlp", "head", "neuron"] = Field(
        "residual", description="residual, attention, mlp, head (before the projection) or neuron (inside the MLP)."
    )
    reduction: Reduction = Field("none", description="none, mean or max: over the chosen positions of each prompt.")
