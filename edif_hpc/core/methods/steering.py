"""Parameters of steering-vector and steer: a direction out of two sets of prompts, and what it does to a third."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ._base import Factors, Layers, Method, Number, Positions, Prompts, Reduction, Words


class Contrast(Method):
    """Two sets of prompts, and where they are read."""

    positive: Prompts = Field(description="Prompts that show what is to be added.")
    negative: Prompts = Field(description="Prompts that show its opposite, or its absence.")
    positions: Positions = Field("last", description="last, all, or a list of token numbers; negative: from the end.")
    reduction: Reduction = Field("mean", description="mean or max: over the chosen positions of each prompt.")
    normalised: bool = Field(False, description="Whether vectors are scaled to length 1.")
    batch_tokens: Number = Field(4096, ge=1, description="Tokens, padding included, that one forward pass holds.")


class SteeringVector(Contrast):
    name = "steering-vector"
    gives = "A direction a layer between two sets of prompts."

    layers: Layers | None = Field(None, description="Layers from 0, negative ones from the last; none: all.")


class SteerSettings(Method):
    """What steering does besides the vector that it adds."""

    name = "steer"

    prompts: Prompts = Field(description="Texts, or lists of token ids.")
    factors: Factors = Field([0.0, 1.0], description="What the vector is multiplied by, one run each.")
    new_tokens: Number = Field(
        20, ge=0, le=4096, description="Tokens to write, 0 to 4096; 0: only the next token's odds."
    )
    answer: Words = Field([], description="With `wrong`: the token whose logit is followed.")
    wrong: Words = Field([], description="With `answer`: the token whose logit is taken from it.")
    batch_tokens: Number = Field(
        4096, ge=1, description="Tokens, padding and written ones included, that one forward pass holds."
    )

    @model_validator(mode="after")
    def both_or_none(self) -> Self:
        if len(self.answer) != len(self.wrong) or len(self.answer) > 1:
            raise ValueError("answer and wrong go together, one token each; give both or neither")
        return self


class Steer(SteerSettings, Contrast):
    """`steer` by name: the vector is made of two sets of prompts first."""

    name = "steer"
    gives = "What is written, and its odds, with such a direction added."
    is_table = True

    layers: Layers = Field(description="Layers that the vector is read from and added to.")
