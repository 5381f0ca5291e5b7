"""extract_activations: numbers taken out of a model's layers, reduced where the model is.

Everything else begins here: probes and steering vectors are made of what this gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.methods import ExtractActivations

from . import _figures
from ._inputs import Ids, batch_spots, batches, chosen, in_order, spots, texts, token_ids
from ._names import Names
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Result):
    """What `extract_activations` found.

    Attributes:
        values: (prompts, layers, positions, …) in the model's dtype, on the CPU. The last dimension is the width of the
            residual stream; for `head` the last two are heads and the width of a head, for `neuron` it is the neurons.
            After a reduction there is one position. Where a prompt has fewer positions than others, 0.
        there: (prompts, positions), bool: which positions a prompt has.
        layers: number of each layer, from 0.
        component: what was read.
        tokens: each prompt's tokens as text.
    """

    values: torch.Tensor
    there: torch.Tensor
    layers: list[int]
    component: str
    tokens: list[list[str]]

    def at(self, layer: int) -> torch.Tensor:
        """The values of one layer, (prompts, positions, …)."""
        return self.values[:, self.layers.index(layer)]

    def plot(self, path: str | Path | None = None) -> Any:
        """How long the vectors are, by prompt and layer, mean over positions: a plotly figure."""
        norms = self.values.float().flatten(3).norm(dim=-1)
        there = self.there[:, None].float()
        mean = (norms * there).sum(-1) / there.sum(-1)
        names = ["".join(each)[-24:] for each in self.tokens]
        figure = _figures.heatmap(
            mean.T, title=f"Length of {self.component} activations", rows=self.layers, columns=names, row_name="layer",
            column_name="prompt", scale_name="Euclidean length",
        )  # fmt: skip
        return _figures.finished(figure, path)


def extract_activations(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Literal["last", "all"] | int | Sequence[int] = "last",
    reduction: Literal["none", "mean", "max"] = "none",
    component: Literal["residual", "attention", "mlp", "head", "neuron"] = "residual",
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> Activations:
    """Activations of chosen layers at chosen tokens.

    The model is run in batches of similar length, no further than the last layer that is asked for; only what is asked
    for leaves it.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        prompts: texts, or lists of token ids.
        layers: from 0, negative ones from the last; None: all.
        positions: tokens of each prompt: the last, all, or these; negative ones count from its end.
        reduction: over the positions of each prompt: mean (in float32) or max; none keeps them.
        component: `residual` (behind the layer), `attention` or `mlp` (what that module hands on: where a norm stands
            between it and the residual stream, as in Gemma, before that norm), `head` (before the projection), `neuron`
            (before the MLP's last map).
        batch_tokens: tokens of one forward pass, padding included.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: a parameter, layer or position cannot be used, or the architecture names its parts in another way.
    """
    asked = ExtractActivations.checked(
        prompts=prompts, layers=layers, positions=positions, reduction=reduction, component=component,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    return run(model, asked, remote, progress)


def run(model: Any, asked: ExtractActivations, remote: bool | str = False, progress: bool | None = None) -> Activations:
    """`extract_activations` with parameters that were checked."""
    names = Names.of(model)
    ids = token_ids(model, asked.prompts)
    numbers = chosen(asked.layers, len(names.layers), "layer")
    for prompt, each in enumerate(ids):
        spots(asked.positions, len(each), prompt)
    arguments = {
        "ids": ids, "layers": numbers, "positions": asked.positions, "reduction": asked.reduction,
        "component": asked.component, "budget": asked.batch_tokens, "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    return Activations(
        **answer, layers=numbers, component=asked.component, tokens=texts(model, ids), record=record(asked, about)
    )


@torch.no_grad()
def work(
    model: Any,
    ids: Ids,
    layers: list[int],
    positions: str | list[int],
    reduction: str,
    component: str,
    budget: int,
    how: str,
) -> Answer:
    """Runs where the model is; `values` and `there` as in `Activations`."""
    names = Names.of(model)
    parts = batches(ids, budget)
    values, there = [], []
    for batch in tracked(parts, "extract_activations", how, [len(each.which) for each in parts]):
        places = batch_spots(batch, positions)
        with model.trace(**batch.inputs) as tracer:
            found = [
                places.reduced(places.of(names.read(layer, component)), reduction).to("cpu", copy=True)
                for layer in layers
            ]
            tracer.stop()
        values.append((batch, torch.stack(found, 1)))
        there.append(
            (batch, places.there if reduction == "none" else torch.ones(len(batch.which), 1, dtype=torch.bool))
        )
    return {"values": in_order(values, 2), "there": in_order(there, 1)}
