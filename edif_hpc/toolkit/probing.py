"""probe: what a layer's activations tell apart, by a line through them, and how well on prompts that it never saw.

Two kinds of line. `linear` is logistic regression, fitted by torch's LBFGS: scikit-learn's would be as good, but
is not where models run, and LBFGS runs inside a session as well. `mass_mean` is the difference of the two classes'
means with the threshold half way, which has nothing to fit. Source: Alain and Bengio, "Understanding intermediate
layers using linear classifier probes" (2016); Marks and Tegmark, "The Geometry of Truth" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import ExtractActivations, ProbeSettings
from edif_hpc.core.methods import Probe as Parameters

from . import _figures, extraction
from ._result import Result
from .extraction import Activations

STEPS = 500
"""Of LBFGS at most; it stops by itself when nothing changes any more, usually after some tens."""
STOP: dict[str, Any] = {
    "max_iter": STEPS,
    "line_search_fn": "strong_wolfe",
    "tolerance_grad": 1e-9,
    "tolerance_change": 1e-13,
}
LEAST_SPREAD = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class Probe(Result):
    """What `probe` learnt: one line a layer and class. With two classes there is one line, for the second against the
    first.

    Attributes:
        directions: (layers, lines, width), float64: to be multiplied with activations as they are.
        offsets: (layers, lines), float64: to be added.
        accuracy: (layers,), float32: share that is right of the held-out prompts.
        train_accuracy: (layers,), float32: of those it learnt from.
        held_out: (prompts,), bool: which were held out.
        classes: the labels, in the order of the lines.
        layers: number of each layer, from 0.
        kind: `linear` or `mass_mean`.
        component: what it was trained on, as `extract_activations` calls it.
    """

    directions: torch.Tensor
    offsets: torch.Tensor
    accuracy: torch.Tensor
    train_accuracy: torch.Tensor
    held_out: torch.Tensor
    classes: list[Any]
    layers: list[int]
    kind: str
    component: str = "residual"

    def scores(self, activations: Activations | torch.Tensor, layer: int) -> torch.Tensor:
        """How far activations (prompts, width) lie on each line of one layer: (prompts, lines), float64.

        Raises:
            MethodError: the layer has no probe, or the activations do not fit.
        """
        if layer not in self.layers:
            raise MethodError(f"There is no probe of layer {layer}; there are those of {self.layers}.")
        number = self.layers.index(layer)
        flat = activations.at(layer) if isinstance(activations, Activations) else activations
        flat = flat.double().flatten(1)
        if flat.shape[1] != self.directions.shape[2]:
            raise MethodError(
                f"The activations are {flat.shape[1]} wide and the probe {self.directions.shape[2]}; extract them as "
                "those it learnt from."
            )
        return flat @ self.directions[number].T + self.offsets[number]

    def predict(self, activations: Activations | torch.Tensor, layer: int) -> list[Any]:
        """The class of each prompt, by the probe of one layer."""
        return [self.classes[number] for number in _decided(self.scores(activations, layer)).tolist()]

    def plot(self, path: str | Path | None = None) -> Any:
        """Accuracy by layer, on held-out prompts and on those it learnt from: a plotly figure."""
        chance = torch.full_like(self.accuracy, 1 / len(self.classes))
        figure = _figures.lines(
            {"held out": self.accuracy, "learnt from": self.train_accuracy, "chance": chance}, self.layers,
            title=f"{'Linear' if self.kind == 'linear' else 'Mass-mean'} probe of {len(self.classes)} classes",
            x_name="layer", y_name="share that is right",
        )  # fmt: skip
        return _figures.finished(figure, path)


def probe(
    activations: Activations,
    labels: Sequence[bool | int | str] | torch.Tensor,
    *,
    kind: Literal["linear", "mass_mean"] = "linear",
    held_out: float | Sequence[bool] | torch.Tensor = 0.25,
    penalty: float = 0.01,
    seed: int = 0,
) -> Probe:
    """One probe a layer, tried on what was held out.

    It needs no model and runs where it is called: inside a session after `extract_activations` there, else here.

    Args:
        activations: one vector a prompt and layer, as `extract_activations` gives with one position or a reduction.
        labels: the class of each prompt; also as a tensor or an array.
        kind: `linear` (logistic regression on standardised activations) or `mass_mean` (two classes).
        held_out: a share of each class, drawn with `seed`, or a true for each prompt that is held out. Prompts that are
            alike belong together on one side: a template or a subject that was trained on tells the answer.
        penalty: weight of half the squared length, on standardised activations, in a linear probe.
        seed: draws the share.

    Raises:
        MethodError: labels, share or activations cannot be used.
    """
    given, out = (each.tolist() if hasattr(each, "tolist") else each for each in (labels, held_out))
    asked = ProbeSettings.checked(labels=given, kind=kind, held_out=out, penalty=penalty, seed=seed)
    return fitted(activations, asked)


def run(model: Any, asked: Parameters, remote: bool | str = False, progress: bool | None = None) -> Probe:
    """`probe` by name: activations first, where the model is, then the probe, here."""
    names = ExtractActivations.model_fields
    wanted = ExtractActivations.checked(**{name: getattr(asked, name) for name in names})
    return fitted(extraction.run(model, wanted, remote, progress), asked)


def fitted(activations: Activations, asked: ProbeSettings) -> Probe:
    """`probe` with parameters that were checked."""
    if not isinstance(activations, Activations):
        raise MethodError(
            f"A probe is trained on Activations, not on a {type(activations).__name__}; call extract_activations."
        )
    values = activations.values
    if values.shape[2] != 1:
        raise MethodError(
            f"A probe reads one vector a prompt, and these have {values.shape[2]} positions; extract them with one "
            "position, or reduction='mean'."
        )
    if len(asked.labels) != values.shape[0]:
        raise MethodError(f"There are {len(asked.labels)} labels for {values.shape[0]} prompts; give one each.")
    classes = list(dict.fromkeys(sorted(asked.labels, key=lambda label: (str(type(label)), label))))
    truth = torch.tensor([classes.index(label) for label in asked.labels])
    out = _held_out(truth, asked)
    directions, offsets, accuracy, known = [], [], [], []
    with torch.enable_grad():
        for layer in range(values.shape[1]):
            flat = values[:, layer].double().flatten(1)
            direction, offset = FITS[asked.kind](flat[~out], truth[~out], len(classes), asked.penalty)
            right = _decided(flat @ direction.T + offset) == truth
            directions.append(direction)
            offsets.append(offset)
            accuracy.append(right[out].float().mean())
            known.append(right[~out].float().mean())
    return Probe(
        torch.stack(directions), torch.stack(offsets), torch.stack(accuracy), torch.stack(known), out, classes,
        activations.layers, asked.kind, activations.component,
        record={**activations.record, "method": "probe", "activations": activations.record.get("parameters"),
                "parameters": asked.model_dump(mode="json")},
    )  # fmt: skip


def _held_out(truth: torch.Tensor, asked: ProbeSettings) -> torch.Tensor:
    """(prompts,), bool: which are for the test. A share is taken of each class by itself, one of each at least."""
    if not isinstance(asked.held_out, float):
        return torch.tensor(asked.held_out)
    generator = torch.Generator().manual_seed(asked.seed)
    out = torch.zeros(len(truth), dtype=torch.bool)
    for label in range(int(truth.max()) + 1):
        members = (truth == label).nonzero().flatten()
        count = max(1, round(asked.held_out * len(members)))
        if count >= len(members):
            raise MethodError(
                f"A class has {len(members)} prompts, too few to hold {asked.held_out:.0%} out and learn from "
                "the rest; give more, or say which with held_out=[True, False, …]."
            )
        out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return out


def _linear(x: torch.Tensor, truth: torch.Tensor, classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression: directions (lines, width) and offsets (lines,), on `x` as it is."""
    center, spread = x.mean(0), x.std(0).clamp_min(LEAST_SPREAD)
    scaled = (x - center) / spread
    lines = 1 if classes == 2 else classes
    weights = torch.zeros(lines, x.shape[1], dtype=x.dtype, requires_grad=True)
    offsets = torch.zeros(lines, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, offsets], **STOP)

    def loss() -> torch.Tensor:
        scores = scaled @ weights.T + offsets
        if lines == 1:
            wrong = torch.nn.functional.binary_cross_entropy_with_logits(scores[:, 0], truth.to(x.dtype))
        else:
            wrong = torch.nn.functional.cross_entropy(scores, truth)
        total = wrong + penalty / 2 * weights.square().sum()
        weights.grad, offsets.grad = torch.autograd.grad(total, [weights, offsets])
        return total.detach()

    optimiser.step(loss)  # type: ignore[no-untyped-call]  # torch annotates no optimiser
    direction = (weights / spread).detach()
    return direction, offsets.detach() - direction @ center


def _mass_mean(x: torch.Tensor, truth: torch.Tensor, classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = x[truth == 0].mean(0), x[truth == 1].mean(0)
    direction = second - first
    return direction[None], -((first + second) / 2 @ direction)[None]


FITS = {"linear": _linear, "mass_mean": _mass_mean}


def _decided(scores: torch.Tensor) -> torch.Tensor:
    """(prompts, lines) to the number of a class each."""
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(1)
