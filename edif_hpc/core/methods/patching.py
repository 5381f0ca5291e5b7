"""Parameters of activation-patching and attribution-patching: pairs of prompts, and where one is put into the other."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ._base import Component, Heads, Layers, Method, Number, Positions, Prompts, Words


class Pairs(Method):
    """What both ways of patching take."""

    clean: Prompts = Field(description="Prompts that the model answers with `answer`.")
    corrupt: Prompts = Field(description="As many prompts, of as many tokens each, that it answers with `wrong`.")
    answer: Words = Field(min_length=1, description="The right next token of each pair, or one for all.")
    wrong: Words = Field(min_length=1, description="The wrong next token of each pair, or one for all.")
    component: Component = Field("residual", description="residual, attention, mlp or head.")
    layers: Layers | None = Field(None, description="Layers from 0, negative ones from the last; none: all.")
    positions: Positions = Field("all", description="last, all, or a list of token numbers; negative: from the end.")
    heads: Heads | None = Field(None, description="Only with component head: heads from 0; none: all.")

    @model_validator(mode="after")
    def fits(self) -> Self:
        if len(self.clean) != len(self.corrupt):
            raise ValueError(
                f"there are {len(self.clean)} clean and {len(self.corrupt)} corrupt prompts; each pair needs both"
            )
        for name, words in (("answer", self.answer), ("wrong", self.wrong)):
            if len(words) not in (1, len(self.clean)):
                raise ValueError(f"{name} has {len(words)} words for {len(self.clean)} pairs; give one, or one a pair")
        if self.heads is not None and self.component != "head":
            raise ValueError(f"heads are given, but component is {self.component!r}; ask for component 'head'")
        return self


class ActivationPatching(Pairs):
    name = "activation-patching"
    gives = "What each site of a clean run brings back of an answer in a corrupt one."
    is_table = True

    batch_tokens: Number = Field(
        4096, ge=1, description="Tokens that one forward pass holds: rows are patched side by side."
    )


class AttributionPatching(Pairs):
    name = "attribution-patching"
    gives = "The same for all sites at once, estimated from one gradient."
    is_table = True
