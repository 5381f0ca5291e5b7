"""top_neurons: which neurons of the MLPs are most active at a token.

A neuron is one input of the MLP's last linear map, behind activation function and gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.methods import TopNeurons as Parameters

from . import _figures, _tables
from ._inputs import Ids, at_most, batch_spots, batches, chosen, in_order, spots, texts, token_ids
from ._names import Names
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record


@dataclass(frozen=True, eq=False, repr=False)
class TopNeurons(Result):
    """What `top_neurons` found. Where a prompt has fewer positions than others, 0.

    Attributes:
        ids: (prompts, layers, positions, top), int64: neurons, the most active first.
        values: (prompts, layers, positions, top), float32: their activations, with sign.
        there: (prompts, positions), bool: which positions a prompt has.
        layers: number of each layer, from 0.
        tokens: each prompt's tokens at these positions, as text.
    """

    ids: torch.Tensor
    values: torch.Tensor
    there: torch.Tensor
    layers: list[int]
    tokens: list[list[str]]

    def table(self) -> _tables.Columns:
        """One row a prompt, position and layer; `ids` and `values` are lists, the most active first."""
        return _tables.by_spot(self.tokens, self.layers, self.there, {"ids": self.ids, "values": self.values})

    def plot(self, path: str | Path | None = None, *, prompt: int = 0, position: int = -1, most: int = 20) -> Any:
        """The most active neurons of all layers at one token, by absolute value: a plotly figure."""
        prompt = _figures.picked(prompt, len(self.tokens), "prompt")
        column = _figures.picked(position, int(self.there[prompt].sum()), "position")
        values, ids = self.values[prompt, :, column].flatten(), self.ids[prompt, :, column].flatten()
        kept = values.abs().topk(min(most, values.numel())).indices
        each = self.ids.shape[-1]
        names = [f"L{self.layers[int(spot) // each]} N{int(ids[spot])}" for spot in kept]
        title = f"Most active neurons at {_figures.visible(self.tokens[prompt][column])!r}"
        return _figures.finished(_figures.bars(values[kept], names, title=title, x_name="activation"), path)


def top_neurons(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Literal["last", "all"] | int | Sequence[int] = "last",
    top: int = 5,
    by: Literal["absolute", "value"] = "absolute",
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> TopNeurons:
    """The most active neurons of each layer's MLP at chosen tokens.

    Args:
        model: an nnsight TransformersModel with a causal text decoder; no mixture of experts.
        prompts: texts, or lists of token ids.
        layers: from 0, negative ones from the last; None: all.
        positions: tokens of each prompt: the last, all, or these; negative ones count from its end.
        top: how many are kept.
        by: `absolute` ranks by size of either sign, `value` the largest first.
        batch_tokens: tokens of one forward pass, padding included.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: a parameter, layer or position cannot be used, `top` is more than an MLP has neurons, or the MLPs
            have no such map.
    """
    asked = Parameters.checked(
        prompts=prompts, layers=layers, positions=positions, top=top, by=by, batch_tokens=batch_tokens
    )
    return run(model, asked, remote, progress)


def run(model: Any, asked: Parameters, remote: bool | str = False, progress: bool | None = None) -> TopNeurons:
    """`top_neurons` with parameters that were checked."""
    names = Names.of(model)
    ids = token_ids(model, asked.prompts)
    numbers = chosen(asked.layers, len(names.layers), "layer")
    places = [spots(asked.positions, len(each), prompt) for prompt, each in enumerate(ids)]
    for layer in numbers:
        at_most(asked.top, names.neurons(layer), f"neurons in the MLP of layer {layer}")
    arguments = {
        "ids": ids, "layers": numbers, "positions": asked.positions, "top": asked.top, "by": asked.by,
        "budget": asked.batch_tokens, "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    read = texts(model, ids)
    tokens = [[each[place] for place in at] for each, at in zip(read, places, strict=True)]
    return TopNeurons(**answer, layers=numbers, tokens=tokens, record=record(asked, about))


@torch.no_grad()
def work(
    model: Any, ids: Ids, layers: list[int], positions: str | list[int], top: int, by: str, budget: int, how: str
) -> Answer:
    """Runs where the model is; see `TopNeurons`."""
    names = Names.of(model)
    parts = batches(ids, budget)
    kept: dict[str, list[Any]] = {"ids": [], "values": [], "there": []}
    for batch in tracked(parts, "top_neurons", how, [len(each.which) for each in parts]):
        places = batch_spots(batch, positions)
        with model.trace(**batch.inputs) as tracer:
            which, sizes = [], []
            for layer in layers:
                active = places.of(names.read(layer, "neuron")).float()
                order = (active.abs() if by == "absolute" else active).topk(top, -1).indices
                which.append(order.cpu())
                sizes.append(active.gather(-1, order).cpu())
            tracer.stop()
        here = places.there[:, None, :, None]
        kept["ids"].append((batch, torch.stack(which, 1) * here))
        kept["values"].append((batch, torch.stack(sizes, 1) * here))
        kept["there"].append((batch, places.there))
    return {"ids": in_order(kept["ids"], 2), "values": in_order(kept["values"], 2), "there": in_order(kept["there"], 1)}
