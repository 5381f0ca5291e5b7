"""activation_patching: put what a component computed on one prompt into a run on another, and see what the answer does.

Source: Vig et al., "Investigating Gender Bias in Language Models Using Causal Mediation Analysis" (2020); Meng et al.,
"Locating and Editing Factual Associations in GPT" (2022). The measures are those of Zhang and Nanda, "Towards Best
Practices of Activation Patching" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import ActivationPatching as Parameters

from . import _figures, _tables
from ._inputs import Ids
from ._names import Names
from ._pairs import difference, divergence, prepared, share, warn_of_nothing_between
from ._progress import tracked, way
from ._result import Result
from ._run import Answer, answered, record

Site = tuple[int, int, int]
"""Layer, token, head (0 where the component has none)."""


@dataclass(frozen=True, eq=False, repr=False)
class Patching(Result):
    """What `activation_patching` found. Logits are float32; the last dimension `heads` is there for `head` alone.

    Attributes:
        difference: (pairs, layers, positions[, heads]): logit of the answer less logit of the wrong one when that site
            of the corrupt run has what the clean one had.
        kl: same shape: KL(clean || patched) of the next token, nats.
        clean, corrupt: (pairs,): the difference without patching.
        corrupt_kl: (pairs,): KL(clean || corrupt), nats.
        component, layers, heads: what was patched.
        tokens: each corrupt prompt's tokens at these positions, as text.
        positions: of each pair the positions by number, from 0.
    """

    difference: torch.Tensor
    kl: torch.Tensor
    clean: torch.Tensor
    corrupt: torch.Tensor
    corrupt_kl: torch.Tensor
    component: str
    layers: list[int]
    heads: list[int]
    tokens: list[list[str]]
    positions: list[list[int]] = field(default_factory=list)

    @property
    def recovery(self) -> torch.Tensor:
        """Share of the clean difference that a site brings back, same shape: 0 is the corrupt run, 1 the clean one.

        NaN for a pair whose two runs have the same difference, to a thousandth of a logit.
        """
        moved = self.difference - self.corrupt.view(-1, *[1] * (self.difference.dim() - 1))
        return share(moved, self.clean, self.corrupt)

    def table(self) -> _tables.Columns:
        """One row a site: pair, layer, position and, of heads, head."""
        found = {"difference": self.difference, "recovery": self.recovery, "kl": self.kl}
        return _tables.by_site(self.tokens, self.layers, self.heads, found)

    def plot(
        self,
        path: str | Path | None = None,
        *,
        measure: Literal["recovery", "difference", "kl"] = "recovery",
        pair: int | None = None,
        position: int = -1,
    ) -> Any:
        """A map of layers and positions, or of layers and heads at one position: a plotly figure.

        Args:
            pair: one of them; None: their mean, of recovery without the pairs that have none.

        Raises:
            MethodError: there is no such measure, pair or position, or the file cannot be written.
        """
        names = {"recovery": "share recovered", "difference": "logit difference", "kl": "KL, nats"}
        if measure not in names:
            raise MethodError(f"There is no measure {measure!r}; there are {', '.join(names)}.")
        figure = _figures.sites(
            getattr(self, measure), self, pair, position, scale_name=names[measure], signed=measure != "kl",
            title=f"Activation patching: {self.component}, clean into corrupt",
        )  # fmt: skip
        return _figures.finished(figure, path)


def activation_patching(
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
    batch_tokens: int = 4096,
    remote: bool | str = False,
    progress: bool | None = None,
) -> Patching:
    """Every site of the corrupt run by itself replaced by the clean one, and the next token judged.

    Sites are patched side by side, as rows of one forward pass. What comes back is one number a site and measure.

    Args:
        model: an nnsight TransformersModel with a causal text decoder.
        clean: prompts that the model answers with `answer`.
        corrupt: as many prompts, each of as many tokens as its clean one.
        answer, wrong: the next token that is right for the clean prompt, and the one for the corrupt: words of one
            token, or ids; one for all pairs, or one each.
        component: `residual` (behind the layer), `attention`, `mlp` (their output), or `head` (one head's part of what
            the projection takes).
        layers: from 0, negative ones from the last; None: all.
        positions: tokens of each prompt: the last, all, or these; negative ones count from its end.
        heads: with component `head`: from 0; None: all.
        batch_tokens: tokens of one forward pass: so many rows side by side.
        remote: as nnsight's: True runs at the service.
        progress: None shows a bar where somebody looks; False nothing.

    Raises:
        MethodError: prompts of a pair differ in length or not at all, a parameter, layer, head, position or word
            cannot be used, or the architecture names its parts in another way.
    """
    asked = Parameters.checked(
        clean=clean, corrupt=corrupt, answer=answer, wrong=wrong, component=component, layers=layers,
        positions=positions, heads=heads, batch_tokens=batch_tokens,
    )  # fmt: skip
    return run(model, asked, remote, progress)


def run(model: Any, asked: Parameters, remote: bool | str = False, progress: bool | None = None) -> Patching:
    """`activation_patching` with parameters that were checked."""
    pairs = prepared(model, asked)
    arguments = {
        "clean": pairs.clean, "corrupt": pairs.corrupt, "answers": pairs.answers, "wrongs": pairs.wrongs,
        "component": asked.component, "layers": pairs.layers, "places": pairs.places, "heads": pairs.heads,
        "budget": asked.batch_tokens, "how": way(progress, remote),
    }  # fmt: skip
    answer, about = answered(model, work, arguments, remote)
    warn_of_nothing_between(answer["clean"], answer["corrupt"])
    return Patching(
        **answer, component=asked.component, layers=pairs.layers, heads=pairs.heads, tokens=pairs.tokens,
        positions=pairs.places, record=record(asked, about),
    )  # fmt: skip


@torch.no_grad()
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
    budget: int,
    how: str,
) -> Answer:
    """Runs where the model is; see `Patching`."""
    names = Names.of(model)
    todo: list[tuple[int, list[Site]]] = []
    for pair, ids in enumerate(corrupt):
        sites = [(layer, place, head) for layer in layers for place in places[pair] for head in heads or [0]]
        rows = max(1, budget // len(ids))
        todo += [(pair, sites[start : start + rows]) for start in range(0, len(sites), rows)]
    kept: dict[str, list[torch.Tensor]] = {"clean": [], "corrupt": [], "corrupt_kl": []}
    effects: list[list[torch.Tensor]] = [[] for _ in corrupt]
    divergences: list[list[torch.Tensor]] = [[] for _ in corrupt]
    states: dict[int, torch.Tensor] = {}
    current, told = -1, torch.empty(0)
    for pair, sites in tracked(todo, "activation_patching", how, [len(sites) for _, sites in todo]):
        answer, wrong = answers[pair], wrongs[pair]
        if pair != current:
            states, told = captured(names, clean[pair], component, layers)
            _, unpatched = captured(names, corrupt[pair], component, [])
            kept["clean"].append(difference(told, answer, wrong))
            kept["corrupt"].append(difference(unpatched, answer, wrong))
            kept["corrupt_kl"].append(divergence(told, unpatched))
            current = pair
        logits = patched(names, corrupt[pair], component, states, sites)
        effects[pair].append(difference(logits, answer, wrong))
        divergences[pair].append(divergence(told, logits))
    shape = (len(corrupt), len(layers), len(places[0]), *([len(heads)] if heads else []))
    return {
        **{name: torch.cat(values) for name, values in kept.items()},
        "difference": torch.stack([torch.cat(each) for each in effects]).view(shape),
        "kl": torch.stack([torch.cat(each) for each in divergences]).view(shape),
    }


def captured(
    names: Names, ids: list[int], component: str, layers: list[int]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """A component's values by layer, each (tokens, …), and the next token's logits, (1, vocabulary) float32."""
    with names.model.trace(input_ids=torch.tensor([ids]), logits_to_keep=1):
        states = {layer: names.read(layer, component)[0].clone() for layer in layers}
        logits = names.model.output.logits[:, -1].float().cpu()
    return states, logits


def patched(
    names: Names, ids: list[int], component: str, states: dict[int, torch.Tensor], sites: list[Site]
) -> torch.Tensor:
    """The next token's logits of one row a site, (sites, vocabulary) float32 on the CPU."""
    with names.model.trace(input_ids=torch.tensor([ids] * len(sites)), logits_to_keep=1):
        for layer in sorted({site[0] for site in sites}):
            now = names.read(layer, component)
            for row, (at, place, head) in enumerate(sites):
                if at == layer and component == "head":
                    now[row, place, head] = states[layer][place, head]
                elif at == layer:
                    now[row, place] = states[layer][place]
        logits = names.model.output.logits[:, -1]
    return torch.as_tensor(logits).float().cpu()
