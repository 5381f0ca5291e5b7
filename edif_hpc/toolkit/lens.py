"""logit_lens: every layer's residual stream read as if it were the last one, by the model's own norm and head.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import LogitLens as Parameters

from . import _figures, _tables
from ._inputs import Ids, at_most, batch, batch_spots, batches, chosen, in_order, one_token, spots, texts, token_ids
from ._names import Names
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record

CHECKED_TOKENS = 8
VOCABULARY_NUMBERS = 2**25
"""Probabilities held at a time: 128 MiB, and a few times that while they are made."""
TOLERANCE = 0.05
"""Of the largest logit: half precision rounds one row otherwise than many. A forgotten scale or cap is far beyond."""


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """What `logit_lens` found. Where a prompt has fewer positions than others, 0.

    Attributes:
        ids: (prompts, layers, positions, top), int64: the likeliest tokens, the likeliest first.
        probabilities: (prompts, layers, positions, top), float32: theirs.
        words: the same tokens as text, nested lists.
        followed: (prompts, layers, positions, tokens), float32: probability of each token that was asked for.
        follows: those tokens as text.
        there: (prompts, positions), bool: which positions a prompt has.
        layers: number of each layer, from 0.
        tokens: each prompt's tokens at these positions, as text.
    """

    ids: torch.Tensor
    probabilities: torch.Tensor
    words: list[list[list[list[str]]]]
    followed: torch.Tensor
    follows: list[str]
    there: torch.Tensor
    layers: list[int]
    tokens: list[list[str]]

    def table(self) -> _tables.Columns:
        """One row a prompt, position and layer; `ids`, `words` and `probabilities` are lists, the likeliest first."""
        found = {"ids": self.ids, "words": self.words, "probabilities": self.probabilities}
        followed = {f"probability of {name!r}": self.followed[..., at] for at, name in enumerate(self.follows)}
        return _tables.by_spot(self.tokens, self.layers, self.there, {**found, **followed})

    def plot(self, path: str | Path | None = None, *, prompt: int = 0) -> Any:
        """The likeliest token of one prompt at each layer and position, and its probability: a plotly figure."""
        prompt = _figures.picked(prompt, len(self.tokens), "prompt")
        count = int(self.there[prompt].sum())
        figure = _figures.heatmap(
            self.probabilities[prompt, :, :count, 0], title="Logit lens: the likeliest next token, layer by layer",
            rows=self.layers, columns=self.tokens[prompt], row_name="layer", column_name="token just read",
            scale_name="probability", top=1.0,
            words=[[_figures.visible(spot[0]) for spot in row[:count]] for row in self.words[prompt]],
        )  # fmt: skip
        return _figures.finished(figure, path)

    def plot_followed(self, path: str | Path | None = None, *, prompt: int = 0, position: int = -1) -> Any:
        """How the probability of each token asked for rises through the layers, at one position: a plotly figure."""
        if not self.follows:
            raise MethodError("No tokens were followed; call logit_lens with tokens=[…].")
        prompt = _figures.picked(prompt, len(self.tokens), "prompt")
        column = _figures.picked(position, int(self.there[prompt].sum()), "position")
        names = _figures.labels(self.follows)
        series = {name: self.followed[prompt, :, column, number] for number, name in enumerate(names)}
        figure = _figures.lines(
            series, self.layers, title="Logit lens", x_name="layer", y_name="probability of the next token"
        )
        return _figures.finished(figure, path)


def logit_lens(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Literal["last", "all"] | int | Sequence[int] = "last",
    top: int = 5,
    tokens: str | int | Sequence[str | int] = (),
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> LogitLens:
    """What each layer would say next: its output through the model's own last norm and head, as probabilities.

    The softmax is taken in float32, where the model is; of the vocabulary only the `top` tokens and those asked for
    leave it. Before anything else one short prompt is run whole, and the last layer's reading must be the model's own.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        prompts: texts, or lists of token ids.
        layers: from 0, negative ones from the last; None: all.
        positions: tokens of each prompt: the last, all, or these; negative ones count from its end.
        top: how many of the likeliest tokens are kept.
        tokens: words of one token, or token ids, whose probability is wanted at every layer.
        batch_tokens: tokens of one forward pass, padding included.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: a parameter, layer, position or word cannot be used, `top` is more than the vocabulary has, or the
            model does more between its last layer
            and its logits than norm, head and cap, so that a lens would mislead.
    """
    asked = Parameters.checked(
        prompts=prompts, layers=layers, positions=positions, top=top, tokens=tokens,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    return run(model, asked, remote, progress)


def run(model: Any, asked: Parameters, remote: bool | str = False, progress: bool | None = None) -> LogitLens:
    """`logit_lens` with parameters that were checked."""
    names = Names.of(model)
    at_most(asked.top, model._module.config.get_text_config().vocab_size, "tokens in the model's vocabulary")
    ids = token_ids(model, asked.prompts)
    numbers = chosen(asked.layers, len(names.layers), "layer")
    places = [spots(asked.positions, len(each), prompt) for prompt, each in enumerate(ids)]
    follows = [one_token(model, word) for word in asked.tokens]
    arguments = {
        "ids": ids, "layers": numbers, "positions": asked.positions, "top": asked.top, "follows": follows,
        "budget": asked.batch_tokens, "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    decode = model.tokenizer.decode
    words = [
        [[[decode([token]) for token in spot] for spot in layer] for layer in prompt]
        for prompt in answer["ids"].tolist()
    ]
    read = texts(model, ids)
    return LogitLens(
        **answer, words=words, follows=[decode([token]) for token in follows], layers=numbers,
        tokens=[[each[place] for place in at] for each, at in zip(read, places, strict=True)],
        record=record(asked, about),
    )  # fmt: skip


@torch.no_grad()
def work(
    model: Any,
    ids: Ids,
    layers: list[int],
    positions: str | list[int],
    top: int,
    follows: list[int],
    budget: int,
    how: str,
) -> Answer:
    """Runs where the model is; see `LogitLens`."""
    names = Names.of(model)
    check(names, ids[0][:CHECKED_TOKENS])
    parts = batches(ids, budget)
    wanted = torch.tensor(follows, dtype=torch.int64)
    kept: dict[str, list[Any]] = {"ids": [], "probabilities": [], "followed": [], "there": []}
    for each in tracked(parts, "logit_lens", how, [len(part.which) for part in parts]):
        places = batch_spots(each, positions)
        with model.trace(**each.inputs) as tracer:
            by_layer = [read(names, places.of(names.read(layer, "residual")), top, wanted) for layer in layers]
            tracer.stop()
        here = places.there[:, None, :, None]
        for name, found in zip(("ids", "probabilities", "followed"), zip(*by_layer, strict=True), strict=True):
            kept[name].append((each, torch.stack(found, 1) * here))
        kept["there"].append((each, places.there))
    at = {"ids": 2, "probabilities": 2, "followed": 2, "there": 1}
    return {name: in_order(values, at[name]) for name, values in kept.items()}


def read(names: Names, state: torch.Tensor, top: int, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Inside a trace: the likeliest tokens of (rows, spots, width), their probabilities and those of `wanted`, each
    (rows, spots, …) on the CPU. Only a part of the spots has its whole vocabulary in memory at a time."""
    flat = state.flatten(0, 1)
    at_once = max(1, VOCABULARY_NUMBERS // names.model._module.config.get_text_config().vocab_size)
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(flat), at_once):
        chances = names.logits(flat[start : start + at_once]).softmax(-1)
        likeliest = chances.topk(top, -1)
        parts.append((likeliest.indices.cpu(), likeliest.values.cpu(), chances[:, wanted.to(chances.device)].cpu()))
    return tuple(torch.cat(each).view(*state.shape[:2], each[0].shape[-1]) for each in zip(*parts, strict=True))


def check(names: Names, ids: list[int]) -> None:
    """Whether the last layer, read through norm and head, is what the model says.

    Raises:
        MethodError: it is not.
    """
    short = batch([ids], [0])
    with names.model.trace(**short.inputs):
        lens = names.logits(names.read(len(names.layers) - 1, "residual")[:, -1])
        own = names.model.output.logits[:, -1].float()
        away = (lens - own).abs().max().item()
        scale = own.abs().max().item()
    if not away <= TOLERANCE * scale:
        raise MethodError(
            f"{type(names.model._module).__name__} does more between its last layer and its logits than norm, head and "
            f"cap: they differ by {away:.3g} of {scale:.3g}. The lens would mislead; read activations with "
            "extract_activations instead."
        )
