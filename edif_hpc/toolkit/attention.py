"""attention_patterns: where each head looks, as maps, or as one number a head for what is looked for.

Only eager attention keeps its weights, so the model is switched to it while this runs, wherever it is, and back.
Source of the induction score: Olsson et al., "In-context Learning and Induction Heads" (2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import AttentionPatterns as Parameters

from . import _figures
from ._inputs import Ids, batches, chosen, texts, token_ids
from ._names import Names
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record

EAGER = "eager"


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(Result):
    """What `attention_patterns` found.

    Attributes:
        patterns: (prompts, layers, heads, tokens, tokens), float32: weight that the token of the row gives to that of
            the column; rows sum to 1 within a prompt's length, beyond it 0. (0,) when only scores were asked for.
        scores: for each that was asked for (prompts, layers, heads), float32, 0 to 1. `previous` and `first`: mean
            weight from each token but the first to the one before it, or to the first. `induction`: mean weight from
            each token that occurred before to the token behind its latest earlier occurrence; NaN without one.
        layers, heads: numbers, from 0.
        tokens: each prompt's tokens as text.
    """

    patterns: torch.Tensor
    scores: dict[str, torch.Tensor]
    layers: list[int]
    heads: list[int]
    tokens: list[list[str]]

    def plot(self, path: str | Path | None = None, *, layer: int, head: int, prompt: int = 0) -> Any:
        """The map of one head: a plotly figure.

        Raises:
            MethodError: there are no maps, or none of that head.
        """
        if not self.patterns.numel() or layer not in self.layers or head not in self.heads:
            raise MethodError(f"There is no map of layer {layer}, head {head}; ask for it, with patterns=True.")
        prompt = _figures.picked(prompt, len(self.tokens), "prompt")
        tokens = self.tokens[prompt]
        found = self.patterns[prompt, self.layers.index(layer), self.heads.index(head), : len(tokens), : len(tokens)]
        labels = [f"{number} {_figures.visible(token)}" for number, token in enumerate(tokens)]
        figure = _figures.heatmap(
            found, title=f"Attention of layer {layer}, head {head}", rows=labels, columns=tokens, row_name="from",
            column_name="to", scale_name="weight", top=1.0,
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed")
        return _figures.finished(figure, path)

    def plot_scores(self, score: str, path: str | Path | None = None) -> Any:
        """One number a head, mean over prompts, as a map of layers and heads: a plotly figure.

        Raises:
            MethodError: the score was not asked for.
        """
        if score not in self.scores:
            raise MethodError(f"There is no score {score!r}; there are {list(self.scores)}.")
        figure = _figures.heatmap(
            self.scores[score].nanmean(0), title=f"Attention heads: {score}", rows=self.layers,
            columns=[str(head) for head in self.heads], row_name="layer", column_name="head", scale_name="score",
            top=1.0,
        )  # fmt: skip
        return _figures.finished(figure, path)


def attention_patterns(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    patterns: bool = True,
    scores: Sequence[Literal["previous", "first", "induction"]] = (),
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> AttentionPatterns:
    """Attention weights of chosen heads, or numbers that say what each head does.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        prompts: texts, or lists of token ids.
        layers: from 0, negative ones from the last; None: all.
        heads: from 0; None: all.
        patterns: whether the maps come back: layers x heads x tokens x tokens a prompt.
        scores: numbers a head, see `AttentionPatterns.scores`.
        batch_tokens: tokens of one forward pass, padding included.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: a parameter, layer or head cannot be used, or this architecture cannot show its weights.
    """
    asked = Parameters.checked(
        prompts=prompts, layers=layers, heads=heads, patterns=patterns, scores=list(scores), batch_tokens=batch_tokens
    )
    return run(model, asked, remote, progress)


def run(model: Any, asked: Parameters, remote: bool | str = False, progress: bool | None = None) -> AttentionPatterns:
    """`attention_patterns` with parameters that were checked."""
    names = Names.of(model)
    ids = token_ids(model, asked.prompts)
    numbers = chosen(asked.layers, len(names.layers), "layer")
    which = chosen(asked.heads, names.heads, "head")
    arguments = {
        "ids": ids, "layers": numbers, "heads": which, "patterns": asked.patterns, "scores": list(asked.scores),
        "budget": asked.batch_tokens, "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    about["attention"] = EAGER
    return AttentionPatterns(
        **answer, layers=numbers, heads=which, tokens=texts(model, ids), record=record(asked, about)
    )


@torch.no_grad()
def work(
    model: Any,
    ids: Ids,
    layers: list[int],
    heads: list[int],
    patterns: bool,
    scores: list[str],
    budget: int,
    how: str,
) -> Answer:
    """Runs where the model is; see `AttentionPatterns`."""
    names = Names.of(model)
    longest = max(map(len, ids))
    shape = (len(ids), len(layers), len(heads), longest, longest)
    maps = torch.zeros(shape if patterns else (0,))
    judged = {score: torch.zeros(shape[:3]) for score in scores}
    parts = batches(ids, budget)
    with eager(model):
        for batch in tracked(parts, "attention_patterns", how, [len(each.which) for each in parts]):
            with model.trace(**batch.inputs) as tracer:
                for number, layer in enumerate(layers):
                    weights = _weights(names, layer)[:, heads].float().cpu()
                    for row, (prompt, length) in enumerate(zip(batch.which, batch.lengths, strict=True)):
                        own = weights[row, :, :length, :length]
                        if patterns:
                            maps[prompt, number, :, :length, :length] = own
                        for score in scores:
                            judged[score][prompt, number] = SCORES[score](own, ids[prompt])
                tracer.stop()
    return {"patterns": maps, "scores": judged}


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """The model with eager attention, for as long as the block runs."""
    before = model.attn_implementation
    module = model._module
    if before != EAGER:
        module.set_attn_implementation(EAGER)
    try:
        yield
    finally:
        if before != EAGER:
            module.set_attn_implementation(before)


def _weights(names: Names, layer: int) -> torch.Tensor:
    """(rows, heads, tokens, tokens)."""
    value = names.attention(layer).output
    if not isinstance(value, tuple) or len(value) < 2 or value[1] is None:
        raise MethodError(
            f"{type(names.model._module).__name__} does not hand on its attention weights, even with eager attention; "
            "use component='head' of extract_activations to see what heads write."
        )
    weights: torch.Tensor = value[1]
    return weights


def _previous(weights: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return weights.diagonal(-1, -2, -1).mean(-1)


def _first(weights: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return weights[:, 1:, 0].mean(-1)


def _induction(weights: torch.Tensor, ids: list[int]) -> torch.Tensor:
    seen: dict[int, int] = {}
    queries, keys = [], []
    for place, token in enumerate(ids):
        if token in seen:
            queries.append(place)
            keys.append(seen[token] + 1)
        seen[token] = place
    return weights[:, queries, keys].mean(-1)


SCORES = {"previous": _previous, "first": _first, "induction": _induction}
"""(heads, tokens, tokens) of one prompt and its ids to (heads,)."""
