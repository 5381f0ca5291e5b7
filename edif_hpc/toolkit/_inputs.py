"""From what a user wrote to what a model takes: token ids, batches that fit, positions, layers, words of one token.

Prompts are padded on the right: every model here is causal, so real tokens neither see the padding nor move for it, and
position numbers need no help. A batch holds prompts of similar length, and results come back in the user's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edif_hpc.core.errors import MethodError

Ids = list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Some prompts, side by side."""

    which: list[int]
    """Their numbers among all."""
    ids: torch.Tensor
    """(rows, tokens), int64, padded on the right."""
    mask: torch.Tensor
    """(rows, tokens), int64: 1 for a token, 0 for padding."""
    lengths: list[int]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}


@dataclass(frozen=True)
class Spots:
    """Chosen tokens of some prompts: `rows[:, None]` and `columns` index (rows, tokens, …)."""

    columns: torch.Tensor
    """(rows, spots), int64; 0 where a prompt has fewer."""
    there: torch.Tensor
    """(rows, spots), bool."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, …) to (rows, spots, …)."""
        rows = torch.arange(values.shape[0], device=values.device)[:, None]
        return values[rows, self.columns.to(values.device)]

    def reduced(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        """(rows, spots, …) to (rows, 1, …): mean or max over the spots that are there; `none` leaves them, others 0."""
        there = self.there.to(values.device).view(*self.there.shape, *[1] * (values.dim() - 2))
        if reduction == "none":
            return values * there
        if reduction == "max":
            return values.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
        summed = (values.float() * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        return summed.to(values.dtype)


def token_ids(model: Any, prompts: Sequence[str | Sequence[int]], written: int = 0) -> Ids:
    """Token ids of each prompt; lists of ids stay as they are.

    Args:
        written: tokens that are to be written behind each; the last of them is not read any more.

    Raises:
        MethodError: the model has no tokenizer, or a prompt no tokens, more than the model can take, or ids outside its
            vocabulary.
    """
    if getattr(model, "tokenizer", None) is None:
        raise MethodError("The model has no tokenizer; make it with one, as TransformersModel(…, tokenizer=…).")
    found = [list(model.tokenizer(each).input_ids) if isinstance(each, str) else list(each) for each in prompts]
    config = model._module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    for number, ids in enumerate(found):
        if not ids:
            raise MethodError(f"Prompt {number} has no tokens; give it text.")
        if longest and len(ids) > longest:
            raise MethodError(f"Prompt {number} has {len(ids)} tokens, and the model takes {longest}; shorten it.")
        if longest and written and len(ids) + written - 1 > longest:
            raise MethodError(
                f"Prompt {number} has {len(ids)} tokens and {written} are to be written, and the model takes "
                f"{longest}; write at most {longest - len(ids) + 1}, or shorten it."
            )
        if max(ids) >= config.vocab_size:
            raise MethodError(f"Prompt {number} has the token {max(ids)}, and there are {config.vocab_size}.")
    return found


def texts(model: Any, ids: Ids) -> list[list[str]]:
    """Each token as text."""
    return [[model.tokenizer.decode([token]) for token in each] for each in ids]


def one_token(model: Any, word: str | int) -> int:
    """The id of a word.

    Raises:
        MethodError: it is more or less than one token, or an id outside the vocabulary, and what to do.
    """
    if isinstance(word, int):
        count = model._module.config.get_text_config().vocab_size
        if not 0 <= word < count:
            raise MethodError(f"There is no token {word}: the model has {count}, numbered from 0 to {count - 1}.")
        return word
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) == 1:
        return int(ids[0])
    pieces = [model.tokenizer.decode([token]) for token in ids]
    spaced = f" {word}"
    better = len(model.tokenizer(spaced, add_special_tokens=False).input_ids) == 1
    advice = f"within a sentence it begins with a space: {spaced!r}" if better else "take another word"
    raise MethodError(f"{word!r} is {len(ids)} tokens ({pieces}), and one is needed; {advice}.")


def at_most(top: int, count: int, what: str) -> None:
    """Refuse to ask for the first `top` of fewer.

    Raises:
        MethodError: there are not so many.
    """
    if top > count:
        raise MethodError(f"top is {top}, and there are {count} {what}; ask for {count} at most.")


def chosen(numbers: Sequence[int] | None, count: int, what: str) -> list[int]:
    """Layers or heads as numbers from 0, in order and each once; None: all.

    Raises:
        MethodError: one of them does not exist.
    """
    if numbers is None:
        return list(range(count))
    for number in numbers:
        if not -count <= number < count:
            raise MethodError(f"There is no {what} {number}: the model has {count}, numbered from 0 to {count - 1}.")
    return sorted({number % count for number in numbers})


def spots(positions: str | Sequence[int], length: int, prompt: int = 0) -> list[int]:
    """The tokens of one prompt that `positions` means.

    Raises:
        MethodError: it is shorter than that.
    """
    if positions == "all":
        return list(range(length))
    if positions == "last":
        return [length - 1]
    for position in positions:
        if not -length <= int(position) < length:
            raise MethodError(
                f"There is no token {position} in prompt {prompt}, which has {length}; give numbers from {-length} to "
                f"{length - 1}."
            )
    return [int(position) % length for position in positions]


def batch_spots(batch: Batch, positions: str | Sequence[int]) -> Spots:
    """The chosen tokens of a batch."""
    each = [spots(positions, length, which) for which, length in zip(batch.which, batch.lengths, strict=True)]
    most = max(map(len, each))
    columns = torch.tensor([one + [0] * (most - len(one)) for one in each])
    there = torch.tensor([[True] * len(one) + [False] * (most - len(one)) for one in each])
    return Spots(columns, there)


def batches(ids: Ids, budget: int, *, written: int = 0, rows: int | None = None) -> list[Batch]:
    """The prompts in batches of at most `budget` tokens, padding included; a longer prompt goes alone.

    Args:
        written: tokens that are to be written behind each: they count too, and a batch has prompts of one length then.
        rows: prompts of a batch at most.
    """
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    groups: list[list[int]] = []
    for number in order:
        group = groups[-1] if groups else []
        longest = len(ids[group[0]]) if group else 0
        fits = (len(group) + 1) * (longest + written) <= budget and (rows is None or len(group) < rows)
        if group and fits and (not written or len(ids[number]) == longest):
            group.append(number)
        else:
            groups.append([number])
    return [batch(ids, group) for group in groups]


def batch(ids: Ids, which: list[int]) -> Batch:
    """These prompts, side by side."""
    lengths = [len(ids[number]) for number in which]
    longest = max(lengths)
    padded = [ids[number] + [0] * (longest - len(ids[number])) for number in which]
    mask = [[1] * length + [0] * (longest - length) for length in lengths]
    return Batch(which, torch.tensor(padded), torch.tensor(mask), lengths)


def in_order(parts: list[tuple[Batch, torch.Tensor]], spots_at: int | None = None) -> torch.Tensor:
    """Rows of all batches, put into the user's order; with `spots_at`, padded with 0 along that dimension."""
    count = sum(len(batch.which) for batch, _ in parts)
    first = parts[0][1]
    shape = list(first.shape)
    shape[0] = count
    if spots_at is not None:
        shape[spots_at] = max(values.shape[spots_at] for _, values in parts)
    whole = torch.zeros(shape, dtype=first.dtype)
    for each, values in parts:
        target = whole if spots_at is None else whole.narrow(spots_at, 0, values.shape[spots_at])
        target[torch.tensor(each.which)] = values
    return whole
