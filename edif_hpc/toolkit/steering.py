"""steering_vector and steer: a direction out of two sets of prompts, and what the model says with it added.

Source: Turner et al., "Activation Addition" (2023); Rimsky et al., "Steering Llama 2 via Contrastive Activation
Addition" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import ExtractActivations, SteerSettings
from edif_hpc.core.methods import Steer as SteerByName
from edif_hpc.core.methods import SteeringVector as Parameters

from . import _figures, extraction
from ._inputs import Batch, Ids, batches, one_token, token_ids
from ._names import Names
from ._pairs import difference, divergence
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record
from .extraction import Activations
from .lens import VOCABULARY_NUMBERS
from .probing import Probe

LABEL = 40
"""Characters of a prompt that a picture shows: its last ones."""


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(Result):
    """A direction a layer.

    Attributes:
        values: (layers, width), float32: to be added to the residual stream behind the layer.
        layers: number of each layer, from 0.
    """

    values: torch.Tensor
    layers: list[int]

    @classmethod
    def between(cls, positive: Activations, negative: Activations, *, normalised: bool = False) -> SteeringVector:
        """Mean of one set of activations less mean of the other, over prompts and positions.

        Raises:
            MethodError: they are not of the residual stream, or of different layers or widths.
        """
        for each in (positive, negative):
            if not isinstance(each, Activations):
                raise MethodError(f"A vector lies between two Activations, and one is a {type(each).__name__}.")
        alike = positive.layers == negative.layers and positive.values.shape[-1] == negative.values.shape[-1]
        if not alike or {positive.component, negative.component} != {"residual"}:
            raise MethodError(
                "Both sets need activations of the residual stream at the same layers; extract them alike."
            )
        values = _mean(positive) - _mean(negative)
        if normalised:
            values = values / values.norm(dim=-1, keepdim=True)
        return cls(
            values, positive.layers,
            record={**_about(positive.record), "made_by": "SteeringVector.between", "normalised": normalised,
                    "positive": positive.record, "negative": negative.record},
        )  # fmt: skip

    @classmethod
    def of(cls, found: Probe) -> SteeringVector:
        """The direction of a probe of two classes, which leads from the first to the second, at length 1.

        Raises:
            MethodError: it tells more than two classes apart, or was not trained on the residual stream, to which a
                vector is added.
        """
        if not isinstance(found, Probe):
            raise MethodError(f"The direction is a Probe's, not a {type(found).__name__}'s; train one with probe.")
        if found.component != "residual":
            raise MethodError(
                f"The probe reads {found.component!r}, and a vector is added to the residual stream; train it on "
                "extract_activations(…, component='residual')."
            )
        if len(found.classes) != 2:
            raise MethodError(f"A probe of {len(found.classes)} classes has no one direction; train it on two.")
        values = found.directions[:, 0].float()
        return cls(
            values / values.norm(dim=-1, keepdim=True), found.layers,
            record={**_about(found.record), "made_by": "SteeringVector.of", "probe": found.record},
        )  # fmt: skip

    def only(self, *layers: int) -> SteeringVector:
        """The same with these layers alone.

        Raises:
            MethodError: there is none for one of them.
        """
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise MethodError(f"There is no vector of layer {missing[0]}; there are those of {self.layers}.")
        wanted = sorted(set(layers))
        return SteeringVector(
            self.values[[self.layers.index(layer) for layer in wanted]], wanted, record=_only(self.record, wanted)
        )

    def plot(self, path: str | Path | None = None) -> Any:
        """The length of the vector by layer: a plotly figure."""
        lengths = {"length": self.values.norm(dim=-1)}
        figure = _figures.lines(
            lengths, self.layers, title="Steering vector", x_name="layer", y_name="Euclidean length"
        )
        return _figures.finished(figure, path)


@dataclass(frozen=True, eq=False, repr=False)
class Steered(Result):
    """What `steer` found.

    Attributes:
        texts: what was written for each prompt and factor; empty texts where nothing was to be written.
        kl: (prompts, factors), float32: KL(as it is || steered) of the next token, nats.
        difference: (prompts, factors), float32: logit of `answer` less logit of `wrong` after the prompt; (0, 0) unless
            they were given.
        factors: what the vector was multiplied by.
        prompts: each prompt as text.
    """

    texts: list[list[str]]
    kl: torch.Tensor
    difference: torch.Tensor
    factors: list[float]
    prompts: list[str]

    def table(self) -> dict[str, list[Any]]:
        """One row a prompt and factor."""
        kl, difference = self.kl.tolist(), self.difference.tolist()
        rows = [(prompt, factor) for prompt in range(len(self.prompts)) for factor in range(len(self.factors))]
        return {
            "prompt": [self.prompts[prompt] for prompt, _ in rows],
            "factor": [self.factors[factor] for _, factor in rows],
            "text": [self.texts[prompt][factor] for prompt, factor in rows],
            "kl": [kl[prompt][factor] for prompt, factor in rows],
            **({"difference": [difference[prompt][factor] for prompt, factor in rows]} if difference else {}),
        }

    def plot(self, path: str | Path | None = None) -> Any:
        """How the next token changes with the factor, a line a prompt: a plotly figure."""
        told = self.difference if self.difference.numel() else self.kl
        name = "logit difference" if self.difference.numel() else "KL from the unsteered model, nats"
        order = sorted(range(len(self.factors)), key=lambda number: self.factors[number])
        labels = _figures.labels([prompt[-LABEL:] for prompt in self.prompts])
        series = {label: told[number, order] for number, label in enumerate(labels)}
        figure = _figures.lines(
            series,
            [self.factors[number] for number in order],
            title="Steering",
            x_name="factor",
            y_name=name,
            zero=True,
        )
        return _figures.finished(figure, path)


def steering_vector(
    model: Any,
    positive: str | Sequence[str | Sequence[int]],
    negative: str | Sequence[str | Sequence[int]],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Literal["last", "all"] | int | Sequence[int] = "last",
    reduction: Literal["mean", "max"] = "mean",
    normalised: bool = False,
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> SteeringVector:
    """Mean activation of the residual stream over some prompts less that over others.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        positive: prompts that show what is to be added.
        negative: prompts that show its opposite, or its absence.
        layers: from 0, negative ones from the last; None: all.
        positions, reduction: tokens of each prompt, and what is made of several.
        normalised: whether each layer's vector is scaled to length 1.
        batch_tokens: tokens of one forward pass, padding included.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: a parameter, layer or position cannot be used.
    """
    asked = Parameters.checked(
        positive=positive, negative=negative, layers=layers, positions=positions, reduction=reduction,
        normalised=normalised, batch_tokens=batch_tokens,
    )  # fmt: skip
    return run_vector(model, asked, remote, progress)


def run_vector(
    model: Any, asked: Parameters | SteerByName, remote: bool | str = False, progress: bool | None = None
) -> SteeringVector:
    """`steering_vector` with parameters that were checked."""
    both = [*asked.positive, *asked.negative]
    wanted = ExtractActivations.checked(
        prompts=both, layers=asked.layers, positions=asked.positions, reduction=asked.reduction,
        batch_tokens=asked.batch_tokens,
    )  # fmt: skip
    found = extraction.run(model, wanted, remote, progress)
    mean = found.values[:, :, 0].float()
    values = mean[: len(asked.positive)].mean(0) - mean[len(asked.positive) :].mean(0)
    if asked.normalised:
        values = values / values.norm(dim=-1, keepdim=True)
    return SteeringVector(values, found.layers, record=record(asked, _about(found.record)))


def steer(
    model: Any,
    prompts: str | Sequence[str | Sequence[int]],
    vector: SteeringVector,
    *,
    factors: float | Sequence[float] = (0.0, 1.0),
    new_tokens: int = 20,
    answer: str | int | None = None,
    wrong: str | int | None = None,
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> Steered:
    """The model with `factor * vector` added to every token behind each of the vector's layers, for each factor.

    Text is written greedily, the same tokens each time. Prompts and factors are run side by side, as many as
    `batch_tokens` allows; text is written for prompts of one length at a time.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        prompts: texts, or lists of token ids.
        vector: from `steering_vector`; `.only(layer)` chooses among its layers.
        factors: one run each; 0 is the model as it is.
        new_tokens: tokens to write; 0 writes nothing and judges the next token alone.
        answer, wrong: words of one token, or ids, whose logits are followed.
        batch_tokens: tokens of one forward pass, padding and written ones included.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: a parameter, layer or word cannot be used, the vector is of another width, or a prompt and what is
            to be written are longer than the model takes.
    """
    asked = SteerSettings.checked(
        prompts=prompts, factors=factors, new_tokens=new_tokens, batch_tokens=batch_tokens,
        answer=[] if answer is None else [answer], wrong=[] if wrong is None else [wrong],
    )  # fmt: skip
    return steered(model, asked, vector, remote, progress)


def run(model: Any, asked: SteerByName, remote: bool | str = False, progress: bool | None = None) -> Steered:
    """`steer` by name: the vector first."""
    return steered(model, asked, run_vector(model, asked, remote, progress), remote, progress)


def steered(
    model: Any, asked: SteerSettings, vector: SteeringVector, remote: bool | str = False, progress: bool | None = None
) -> Steered:
    """`steer` with parameters that were checked."""
    names = Names.of(model)
    if not isinstance(vector, SteeringVector):
        raise MethodError(f"steer adds a SteeringVector, not a {type(vector).__name__}; make one with steering_vector.")
    if vector.values.shape[1] != names.width or max(vector.layers) >= len(names.layers):
        raise MethodError(
            f"The vector is {vector.values.shape[1]} wide and goes up to layer {max(vector.layers)}; the model has "
            f"{names.width} and {len(names.layers)} layers: make the vector with this model."
        )
    ids = token_ids(model, asked.prompts, asked.new_tokens)
    judged = [one_token(model, word) for word in (*asked.answer, *asked.wrong)]
    arguments = {
        "ids": ids, "vector": vector.values, "layers": vector.layers, "factors": asked.factors,
        "new_tokens": asked.new_tokens, "judged": judged, "budget": asked.batch_tokens, "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    decode = model.tokenizer.decode
    written = [[decode(row, skip_special_tokens=True) for row in rows] for rows in answer.pop("written")]
    return Steered(
        written, **answer, factors=asked.factors, prompts=[decode(each) for each in ids],
        record={**record(asked, about), "vector": vector.record},
    )  # fmt: skip


@torch.no_grad()
def work(
    model: Any,
    ids: Ids,
    vector: torch.Tensor,
    layers: list[int],
    factors: list[float],
    new_tokens: int,
    judged: list[int],
    budget: int,
    how: str,
) -> Answer:
    """Runs where the model is; see `Steered`. `written` are token ids by prompt and factor."""
    names = Names.of(model)
    levels = [0.0, *dict.fromkeys(factor for factor in factors if factor)]  # each once, and first the model as it is
    wanted = [levels.index(factor) for factor in factors]
    shifts = torch.tensor(levels)[:, None, None, None] * vector[None, :, None]
    runs = [(prompt, level) for prompt in range(len(ids)) for level in range(len(levels))]
    wordy = [(prompt, level) for prompt, level in runs if level in wanted]
    most = max(1, VOCABULARY_NUMBERS // model._module.config.get_text_config().vocab_size)
    judging = batches([ids[prompt] for prompt, _ in runs], budget, rows=most)
    writing = batches([ids[prompt] for prompt, _ in wordy], budget, written=new_tokens) if new_tokens else []
    told: dict[int, torch.Tensor] = {}
    kl, apart = torch.zeros(2, len(ids), len(levels))
    written: list[list[list[int]]] = [[[] for _ in levels] for _ in ids]
    sizes = [len(each.which) for each in judging] + [len(each.which) * new_tokens for each in writing]
    for at, batch in enumerate(tracked([*judging, *writing], "steer", how, sizes)):
        if at < len(judging):
            here = [runs[number] for number in batch.which]
            logits = _next(names, batch, layers, shifts[[level for _, level in here]])
            for (prompt, level), row in zip(here, logits, strict=True):  # as in `runs`: level 0 comes first
                told.setdefault(prompt, row[None])
                kl[prompt, level] = divergence(told[prompt], row[None]) if level else 0.0
                apart[prompt, level] = difference(row, *judged) if judged else 0.0
                if level == len(levels) - 1:
                    del told[prompt]
        else:
            here = [wordy[number] for number in batch.which]
            rows = _written(names, batch, layers, shifts[[level for _, level in here]], new_tokens)
            for (prompt, level), row in zip(here, rows, strict=True):
                written[prompt][level] = row
    return {
        "written": [[each[level] for level in wanted] for each in written],
        "kl": kl[:, wanted],
        "difference": apart[:, wanted] if judged else torch.zeros(0, 0),
    }


def add(names: Names, layers: list[int], shifts: torch.Tensor) -> None:
    """Inside a trace: add (rows, layers, 1, width) behind these layers, at every token of the pass."""
    for number, layer in enumerate(layers):
        state = names.read(layer, "residual")
        state[:] += shifts[:, number].to(state.device, state.dtype)


def _next(names: Names, batch: Batch, layers: list[int], shifts: torch.Tensor) -> torch.Tensor:
    """The logits behind each row's last token, (rows, vocabulary) float32 on the CPU: the head sees no other."""
    last = torch.tensor(batch.lengths) - 1
    with names.model.trace(**batch.inputs):
        add(names, layers, shifts)
        state = names.head.input
        names.head.input = state[torch.arange(len(last), device=state.device), last.to(state.device)][:, None]
        logits = names.model.output.logits[:, -1].float().cpu()
    return torch.as_tensor(logits)


def _written(names: Names, batch: Batch, layers: list[int], shifts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """The tokens that follow, by row. Greedy, and to the full number in each row, so that every step is steered."""
    with names.model.generate(
        **batch.inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    ) as tracer:
        for _ in tracer.iter[:new_tokens]:
            add(names, layers, shifts)
        whole = tracer.result
    written: list[list[int]] = torch.as_tensor(whole)[:, batch.ids.shape[1] :].tolist()
    return written


def _mean(found: Activations) -> torch.Tensor:
    """Over prompts and the positions that are there: (layers, width), float32."""
    there = found.there[:, None, :, None].float()
    per_prompt = (found.values.float() * there).sum(2) / there.sum(2)
    return per_prompt.mean(0)


def _only(record: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The record of a vector of fewer layers: a single call is told as one for these layers alone."""
    if "parameters" in record:
        return {**record, "parameters": {**record["parameters"], "layers": layers}}
    return {**record, "only": layers}


def _about(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the model and of versions."""
    return {name: value for name, value in record.items() if name not in ("method", "parameters", "activations")}
