"""attribution_patching: activation patching estimated for all sites at once, from one gradient.

A screen, not a measurement: it takes the model for linear between the two runs. Sites that matter are to be verified
with `activation_patching`. Source: Nanda, "Attribution Patching: Activation Patching At Industrial Scale" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import AttributionPatching as Parameters

from . import _figures, _tables
from ._inputs import Ids
from ._names import Names, tensor
from ._pairs import difference, prepared, share, warn_of_nothing_between
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record
from .patching import Patching, captured


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """What `attribution_patching` found, float32.

    Attributes:
        effect: (pairs, layers, positions[, heads]): estimated change of the logit difference, in logits.
        clean, corrupt: (pairs,): the difference of the two runs.
        component, layers, heads: what was estimated.
        tokens: each corrupt prompt's tokens at these positions, as text.
        positions: of each pair the positions by number, from 0.
    """

    effect: torch.Tensor
    clean: torch.Tensor
    corrupt: torch.Tensor
    component: str
    layers: list[int]
    heads: list[int]
    tokens: list[list[str]]
    positions: list[list[int]] = field(default_factory=list)

    @property
    def recovery(self) -> torch.Tensor:
        """The estimate as a share of the clean difference that comes back; comparable to `Patching.recovery`, NaN where
        that is."""
        return share(self.effect, self.clean, self.corrupt)

    def table(self) -> _tables.Columns:
        """One row a site: pair, layer, position and, of heads, head."""
        return _tables.by_site(self.tokens, self.layers, self.heads, {"effect": self.effect, "recovery": self.recovery})

    def correlation(self, exact: Patching) -> float:
        """Pearson correlation with exact patching of the same sites, without pairs that have no recovery.

        NaN where fewer than two sites are left, or none differ.

        Raises:
            MethodError: the sites are others, or `exact` is no `Patching`.
        """
        if not isinstance(exact, Patching):
            raise MethodError(f"What it is compared with comes from activation_patching; this is {exact!r:.60}.")
        for name in ("component", "layers", "heads", "tokens", "positions"):
            if getattr(self, name) != getattr(exact, name):
                raise MethodError(f"The two cover different sites: their {name} differ; call both with the same ones.")
        estimated, measured = self.recovery.flatten(), exact.recovery.flatten()
        there = estimated.isfinite() & measured.isfinite()
        if there.sum() < 2:
            return math.nan
        return float(torch.corrcoef(torch.stack([estimated[there], measured[there]]))[0, 1])

    def plot(self, path: str | Path | None = None, *, pair: int | None = None, position: int = -1) -> Any:
        """A map of layers and positions, or for heads of layers and heads at one position: a plotly figure.

        Args:
            pair: one of them; None: their mean.
        """
        figure = _figures.sites(
            self.effect, self, pair, position, title=f"Attribution patching: {self.component}, estimated",
            scale_name="change of the logit difference", signed=True,
        )  # fmt: skip
        return _figures.finished(figure, path)


def attribution_patching(
    model: Any,
    clean: str | Sequence[str | Sequence[int]],
    corrupt: str | Sequence[str | Sequence[int]],
    *,
    answer: str | int | Sequence[str | int],
    wrong: str | int | Sequence[str | int],
    component: Literal["residual", "attention", "mlp", "head"] = "residual",
    layers: int | Sequence[int] | None = None,
    positions: Literal["last", "all"] | int | Sequence[int] = "all",
    heads: int | Sequence[int] | None = None,
    remote: bool | str = False,
    progress: bool | None = None,
) -> Attribution:
    """(clean - corrupt) * gradient of the logit difference in the corrupt run, summed over each site's width.

    Two forward passes and one backward a pair, however many sites there are.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        clean, corrupt, answer, wrong, component, layers, positions, heads: as in `activation_patching`.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: as `activation_patching` does.
    """
    asked = Parameters.checked(
        clean=clean, corrupt=corrupt, answer=answer, wrong=wrong, component=component, layers=layers,
        positions=positions, heads=heads,
    )  # fmt: skip
    return run(model, asked, remote, progress)


def run(model: Any, asked: Parameters, remote: bool | str = False, progress: bool | None = None) -> Attribution:
    """`attribution_patching` with parameters that were checked."""
    pairs = prepared(model, asked)
    arguments = {
        "clean": pairs.clean, "corrupt": pairs.corrupt, "answers": pairs.answers, "wrongs": pairs.wrongs,
        "component": asked.component, "layers": pairs.layers, "places": pairs.places, "heads": pairs.heads,
        "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    warn_of_nothing_between(answer["clean"], answer["corrupt"])
    return Attribution(
        **answer, component=asked.component, layers=pairs.layers, heads=pairs.heads, tokens=pairs.tokens,
        positions=pairs.places, record=record(asked, about),
    )  # fmt: skip


@torch.inference_mode(False)
@torch.enable_grad()
def work(
    model: Any,
    clean: Ids,
    corrupt: Ids,
    answers: list[int],
    wrongs: list[int],
    component: str,
    layers: list[int],
    places: list[list[int]],
    heads: list[int],
    how: str,
) -> Answer:
    """Runs where the model is; see `Attribution`. Gradients are on, whatever the caller has."""
    names = Names.of(model)
    effects, right, spoilt = [], [], []
    for pair in tracked(range(len(corrupt)), "attribution_patching", how):
        with torch.no_grad():
            states, told = captured(names, clean[pair], component, layers)
        right.append(difference(told, answers[pair], wrongs[pair]))
        with model.trace(input_ids=torch.tensor([corrupt[pair]]), logits_to_keep=1):
            tensor(names.embedding.output).requires_grad_(True)  # parameters ask for no gradient at a service
            now = [names.raw(layer, component) for layer in layers]
            metric = difference(model.output.logits[0, -1].float(), answers[pair], wrongs[pair])
            gradients = torch.autograd.grad(metric, now)
            parts = [
                (states[layer] - names.shaped(here[0].detach(), component), names.shaped(gradient[0], component))
                for layer, here, gradient in zip(layers, now, gradients, strict=True)
            ]
            effect = [(moved.float() * slope.float()).sum(-1)[places[pair]].cpu() for moved, slope in parts]
            spoilt.append(metric.detach().cpu()[None])
        effects.append(torch.stack(effect))
    whole = torch.stack(effects)
    return {
        "effect": whole[..., heads] if heads else whole,
        "clean": torch.cat(right),
        "corrupt": torch.cat(spoilt),
    }
