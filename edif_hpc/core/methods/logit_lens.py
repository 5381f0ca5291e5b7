"""Parameters of logit-lens: each layer read as if it were the last one."""

from __future__ import annotations

from pydantic import Field

from ._base import Number, OnPositions, Words


class LogitLens(OnPositions):
    name = "logit-lens"
    gives = "Each layer's likeliest next tokens, and the probability of chosen ones."
    is_table = True

    top: Number = Field(5, ge=1, le=1000, description="How many of the likeliest tokens are kept, 1 to 1000.")
    tokens: Words = Field([], description="Words of one token, or token ids, whose probability is wanted throughout.")
