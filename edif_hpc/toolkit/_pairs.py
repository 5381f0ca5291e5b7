"""Pairs of prompts that differ in what matters, and the numbers by which an answer is judged: shared by both ways of
patching.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import Pairs

from ._inputs import Ids, chosen, one_token, spots, texts, token_ids
from ._names import Names

LEAST_APART = 1e-3
"""Logits: where the two runs of a pair are closer than this, a share of their difference means nothing."""


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
        MethodError: a pair's prompts differ in length or do not differ at all, its two words are the same, or a layer,
            head, position or word cannot be used.
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
    answers, wrongs = (_words(model, words, len(clean)) for words in (asked.answer, asked.wrong))
    for number in range(len(clean)):
        if clean[number] == corrupt[number]:
            raise MethodError(
                f"The prompts of pair {number} are the same, token for token, so nothing can be put back; change in "
                "the corrupt one what the answer depends on."
            )
        if answers[number] == wrongs[number]:
            raise MethodError(
                f"Answer and wrong word of pair {number} are the same token, {answers[number]}; take two that differ."
            )
    read = texts(model, corrupt)
    return Prepared(
        clean,
        corrupt,
        answers,
        wrongs,
        chosen(asked.layers, len(names.layers), "layer"),
        places,
        chosen(asked.heads, names.heads, "head") if asked.component == "head" else [],
        [[each[place] for place in at] for each, at in zip(read, places, strict=True)],
    )


def _words(model: Any, words: list[Any], count: int) -> list[int]:
    ids = [one_token(model, word) for word in words]
    return ids if len(ids) == count else ids * count


def share(moved: torch.Tensor, clean: torch.Tensor, corrupt: torch.Tensor) -> torch.Tensor:
    """Moved logits, (pairs, …), as a share of what lies between the two runs of a pair, (pairs,) each; NaN where that
    is nothing."""
    between = clean - corrupt
    between = between.where(between.abs() >= LEAST_APART, torch.nan)
    return moved / between.view(-1, *[1] * (moved.dim() - 1))


def warn_of_nothing_between(clean: torch.Tensor, corrupt: torch.Tensor) -> None:
    """Say which pairs have no recovery."""
    alike = ((clean - corrupt).abs() < LEAST_APART).nonzero().flatten().tolist()
    if alike:
        shown = ", ".join(map(str, alike[:10])) + (", …" if len(alike) > 10 else "")
        warnings.warn(
            f"The logit difference is the same in both runs of {len(alike)} of {len(clean)} pairs ({shown}): their "
            "recovery is NaN; take prompts, or an answer and a wrong word, between which the two runs decide.",
            stacklevel=4,
        )


def difference(logits: torch.Tensor, answer: int, wrong: int) -> torch.Tensor:
    """Logit of the answer less logit of the wrong one: (rows, vocabulary) to (rows,)."""
    return logits[..., answer] - logits[..., wrong]


def divergence(clean: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(clean || other) of the next token in nats: (1, vocabulary) and (rows, vocabulary) to (rows,)."""
    told = clean.log_softmax(-1)
    return (told.exp() * (told - logits.log_softmax(-1))).sum(-1)
