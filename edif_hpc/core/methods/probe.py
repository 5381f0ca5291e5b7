"""Parameters of probe: what is told apart, by what kind of line, and on what it is tried."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ._base import Method
from .extract_activations import ExtractActivations

Share = Annotated[float, Field(gt=0, lt=1)]


class ProbeSettings(Method):
    """What a probe is besides the activations that it reads."""

    name = "probe"

    labels: list[bool | int | str] = Field(min_length=2, description="A class of each prompt: numbers or words.")
    kind: Literal["linear", "mass_mean"] = Field(
        "linear", description="linear (logistic regression) or mass_mean (difference of the two classes' means)."
    )
    held_out: Share | list[bool] = Field(
        0.25, description="A share between 0 and 1 of each class, or a true for each prompt that is kept for the test."
    )
    penalty: float = Field(0.01, ge=0, description="Weight of the squared length in a linear probe, 0 or more.")
    seed: int = Field(0, ge=0, description="Chooses the share that is held out.")

    @model_validator(mode="after")
    def divisible(self) -> Self:
        classes = list(dict.fromkeys(self.labels))
        if len(classes) < 2:
            raise ValueError(f"all labels are {classes[0]!r}; a probe needs two classes")
        if self.kind == "mass_mean" and len(classes) != 2:
            raise ValueError(f"mass_mean tells two classes apart, and there are {len(classes)}; use kind 'linear'")
        if isinstance(self.held_out, list):
            if len(self.held_out) != len(self.labels):
                raise ValueError(f"held_out has {len(self.held_out)} entries for {len(self.labels)} labels")
            for part, wanted in (("trained on", False), ("held out", True)):
                there = {label for label, out in zip(self.labels, self.held_out, strict=True) if out is wanted}
                missing = [label for label in classes if label not in there]
                if missing and (wanted is False or not there):
                    raise ValueError(f"no prompt of class {missing[0]!r} is {part}; change held_out")
        return self


class Probe(ProbeSettings, ExtractActivations):
    """`probe` by name: the prompts are read first, each at one position."""

    name = "probe"
    gives = "A line a layer that tells labels apart, and how well on prompts held out."

    @model_validator(mode="after")
    def one_each(self) -> Self:
        if len(self.labels) != len(self.prompts):
            raise ValueError(f"there are {len(self.labels)} labels for {len(self.prompts)} prompts; give one each")
        if (
            self.reduction == "none"
            and (self.positions == "all" or len(self.positions) != 1)
            and self.positions != "last"
        ):
            raise ValueError("a probe reads one vector a prompt; choose one position, or reduction mean or max")
        return self
