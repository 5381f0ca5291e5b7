"""Parameters of attention-patterns: who looks at whom, as maps or as one number a head."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ._base import Heads, OverPrompts


class AttentionPatterns(OverPrompts):
    name = "attention-patterns"
    gives = "Who looks at whom: maps of attention, or a number a head."

    heads: Heads | None = Field(None, description="Heads from 0; none: all.")
    patterns: bool = Field(True, description="Whether the maps themselves are kept: layers x heads x tokens x tokens.")
    scores: list[Literal["previous", "first", "induction"]] = Field(
        [],
        description="Numbers a head: attention to the previous token, to the first, or behind an earlier occurrence.",
    )

    @model_validator(mode="after")
    def something(self) -> Self:
        if not self.patterns and not self.scores:
            raise ValueError("neither patterns nor scores are asked for; set one of them")
        return self
