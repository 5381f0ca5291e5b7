"""Parameters of top-neurons: which neurons of the MLPs are most active."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ._base import Number, OnPositions


class TopNeurons(OnPositions):
    name = "top-neurons"
    gives = "The most active neurons of the MLPs."
    is_table = True

    top: Number = Field(5, ge=1, le=10_000, description="How many neurons are kept, 1 to 10000.")
    by: Literal["absolute", "value"] = Field("absolute", description="absolute (either sign) or value (largest first).")
