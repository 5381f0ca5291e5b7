"""Pairs of prompts that differ in what matters, and the numbers by which an answer is judged: shared by both ways of
patching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import Pairs

from ._inputs import Ids, chosen, one_token, spots, texts, token_ids
from ._names import Names


@dataclass(frozen=True)
class Prepared:
    """Pairs as numbers."""

    clean: Ids
    corrupt: Ids
    answers: list[int]
    wrongs: list[int]
    layers: list[int]
    places: list[list[int]]
    """Of each pair: token numbers from 0."""
    heads: list[int]
    """Empty unless the component is `head`."""
    tokens: list[list[str]]
    """Of each corrupt prompt at these places."""


def prepared(model: Any, asked: Pairs) -> Prepared:
    """Everything of the pairs that needs the model's shape and tokenizer.

    Raises:
        MethodError: a pair's prompts differ in length, or a layer, head, position or word cannot be used.
    """
    names = Names.of(model)
    clean, corrupt = token_ids(model, asked.clean), token_ids(model, asked.corrupt)
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise MethodError(
                f"The prompts of pair {number} have {len(one)} and {len(other)} tokens, and a token is put where its "
                "counterpart was; take words of as many tokens."
            )
    places = [spots(asked.positions, len(ids), number) for number, ids in enumerate(corrupt)]
    if len({len(each) for each in places}) > 1:
        raise MethodError(
            "The pairs have different lengths, so that positions do not match; name positions from the end, as "
            "[-1, -2], or patch each pair by itself."
        )
    read = texts(model, corrupt)
    return Prepared(
        clean,
        corrupt,
        _words(model, asked.answer, len(clean)),
        _words(model, asked.wrong, len(clean)),
        chosen(asked.layers, len(names.layers), "layer"),
        places,
        chosen(asked.heads, names.heads, "head") if asked.component == "head" else [],
        [[each[place] for place in at] for each, at in zip(read, places, strict=True)],
    )


def _words(model: Any, words: list[Any], count: int) -> list[int]:
    ids = [one_token(model, word) for word in words]
    return ids if len(ids) == count else ids * count


def difference(logits: torch.Tensor, answer: int, wrong: int) -> torch.Tensor:
    """Logit of the answer less logit of the wrong one: (rows, vocabulary) to (rows,)."""
    return logits[..., answer] - logits[..., wrong]


def divergence(clean: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(clean || other) of the next token in nats: (1, vocabulary) and (rows, vocabulary) to (rows,)."""
    told = clean.log_softmax(-1)
    return (told.exp() * (told - logits.log_softmax(-1))).sum(-1)
