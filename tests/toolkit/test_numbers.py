"""Every method finds in SmolLM2 what `expected.toml` says, here and at the service, and not with a wrong layer or sign.

Each number is checked by a function that both the true method and the spoilt ones go through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edif_hpc import toolkit
from edif_hpc.toolkit import attention, attribution, lens, patching, probing, steering
from edif_hpc.toolkit._names import Names
from tests.support.stack import Stack

from .conftest import EXPECTED

CLEAN, CORRUPT = EXPECTED["prompts"]["clean"], EXPECTED["prompts"]["corrupt"]
PAIR = {"answer": EXPECTED["prompts"]["answer"], "wrong": EXPECTED["prompts"]["wrong"]}

Check = Callable[..., None]


def near(found: Any, wanted: Any, tolerance: float) -> None:
    found, wanted = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance, (found, wanted)


# -- what must hold ----------------------------------------------------------------------------------------------------


def check_logit_lens(model: Any, remote: bool) -> None:
    wanted = EXPECTED["logit_lens"]
    layers = range(wanted["first"], EXPECTED["model"]["layers"])
    found = toolkit.logit_lens(model, CLEAN, layers=layers, tokens=PAIR["answer"], remote=remote)
    near(found.followed[0, :, 0, 0], wanted["probabilities"], wanted["tolerance"])
    assert found.words[0][-1][0][0] == PAIR["answer"]


def check_bias(model: Any, remote: bool) -> None:
    wanted = EXPECTED["bias"]
    found = toolkit.logit_lens(model, wanted["prompts"], layers=-1, tokens=[" she", " he"], remote=remote)
    near(found.followed[:, 0, 0, 0], wanted["she"], wanted["tolerance"])
    near(found.followed[:, 0, 0, 1], wanted["he"], wanted["tolerance"])
    located = EXPECTED["located"]
    found = toolkit.logit_lens(model, located["prompt"], layers=-1, tokens=PAIR["answer"], remote=remote)
    near(found.followed[0, 0, 0, 0], located["probability"], located["tolerance"])


def check_activation_patching(model: Any, remote: bool) -> None:
    wanted = EXPECTED["activation_patching"]
    tolerance = wanted["tolerance"]
    for component in ("residual", "attention", "mlp"):
        sites = wanted[component]
        layers = sorted({layer for layer, _, _ in sites})
        places = sorted({place for _, place, _ in sites})
        found = toolkit.activation_patching(
            model, CLEAN, CORRUPT, **PAIR, component=component, layers=layers, positions=places, remote=remote
        )
        near(found.clean, [wanted["clean_difference"]], tolerance)
        near(found.corrupt, [wanted["corrupt_difference"]], tolerance)
        near(found.corrupt_kl, [wanted["corrupt_kl"]], tolerance)
        for layer, place, recovery in sites:
            near(found.recovery[0, layers.index(layer), places.index(place)], recovery, tolerance)
        for layer, place, divergence in wanted.get(f"{component}_kl", []):
            near(found.kl[0, layers.index(layer), places.index(place)], divergence, tolerance)
    last = toolkit.activation_patching(model, CLEAN, CORRUPT, **PAIR, layers=-1, positions="last", remote=remote)
    near(last.difference[0, 0, 0], last.clean[0], 1e-4)  # the last layer and token are all that the head sees


def check_heads(model: Any, remote: bool) -> None:
    wanted = EXPECTED["activation_patching"]
    layers = sorted({layer for layer, _, _ in wanted["head"]})
    found = toolkit.activation_patching(
        model, CLEAN, CORRUPT, **PAIR, component="head", layers=layers, positions="last", remote=remote
    )
    near(found.clean, [wanted["clean_difference"]], wanted["tolerance"])
    for layer, head, recovery in wanted["head"]:
        near(found.recovery[0, layers.index(layer), 0, head], recovery, wanted["tolerance"])


def check_attribution_patching(model: Any, remote: bool) -> None:
    wanted = EXPECTED["attribution_patching"]
    found = toolkit.attribution_patching(model, CLEAN, CORRUPT, **PAIR, remote=remote)
    near(found.effect[0, -1, -1], wanted["last"], wanted["last_tolerance"])
    near(found.clean, [EXPECTED["activation_patching"]["clean_difference"]], wanted["tolerance"])
    exact = toolkit.activation_patching(model, CLEAN, CORRUPT, **PAIR, remote=remote)
    near(found.correlation(exact), wanted["correlation"], wanted["tolerance"])


def check_attention_patterns(model: Any, remote: bool) -> None:
    wanted = EXPECTED["attention_patterns"]
    once = [wanted["multiplier"] * k % wanted["modulus"] + wanted["offset"] for k in range(1, wanted["count"] + 1)]
    layers = sorted({layer for layer, _, _ in [*wanted["induction"], *wanted["previous"]]})
    scores = ["induction", "previous"]
    found = toolkit.attention_patterns(model, [once * 2], layers=layers, patterns=False, scores=scores, remote=remote)
    for score in scores:
        for layer, head, value in wanted[score]:
            near(found.scores[score][0, layers.index(layer), head], value, wanted["tolerance"])
    for layer, head, value in wanted["figure"]:
        near(found.scores["induction"][0, layers.index(layer), head], value, wanted["figure_tolerance"])


def check_top_neurons(model: Any, remote: bool) -> None:
    wanted = EXPECTED["top_neurons"]
    found = toolkit.top_neurons(model, CLEAN, layers=wanted["layer"], top=len(wanted["ids"]), remote=remote)
    assert found.ids[0, 0, 0].tolist() == wanted["ids"]
    near(found.values[0, 0, 0], wanted["values"], wanted["tolerance"])


def check_probe(model: Any, remote: bool) -> None:
    wanted = EXPECTED["probe"]
    prompts, labels, out = [], [], []
    for template in [*wanted["templates"], wanted["held_out"]]:
        for label, words in ((1, wanted["positive"]), (0, wanted["negative"])):
            prompts += [template.format(word) for word in words]
            labels += [label] * len(words)
            out += [template == wanted["held_out"]] * len(words)
    layers = [wanted["chance_layer"], wanted["right_from"] - 1, wanted["right_from"], 20, 29]
    found = toolkit.extract_activations(model, prompts, layers=layers, remote=remote)
    for kind in ("linear", "mass_mean"):
        learnt = toolkit.probe(found, labels, kind=kind, held_out=out)
        near(learnt.accuracy[0], wanted["chance"], 1e-6)
        near(learnt.accuracy[1], wanted["chance"], 1e-6)
        near(learnt.accuracy[2:], [wanted["right"]] * 3, 1e-6)
        said = learnt.predict(found, layers[2])
        assert [label for label, held in zip(said, out, strict=True) if held] == [
            label for label, held in zip(labels, out, strict=True) if held
        ]


def check_steering(model: Any, remote: bool) -> None:
    wanted = EXPECTED["steering"]
    sets = [[wanted["template"].format(word) for word in EXPECTED["probe"][side]] for side in ("positive", "negative")]
    vector = toolkit.steering_vector(model, *sets, layers=wanted["layer"], remote=remote)
    near(vector.values.norm(), wanted["norm"], wanted["tolerance"])
    found = toolkit.steer(
        model, wanted["prompt"], vector, factors=wanted["factors"], new_tokens=0, answer=wanted["good"],
        wrong=wanted["bad"], remote=remote,
    )  # fmt: skip
    near(found.difference[0], wanted["differences"], wanted["tolerance"])
    assert (found.difference[0].diff() > 0).all()


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


# -- the methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_the_numbers_here(name: str, smol: Any) -> None:
    CHECKS[name](smol, False)


@pytest.mark.parametrize("name", CHECKS)
def test_the_numbers_at_the_service(name: str, connected: Stack, shape: Any) -> None:
    CHECKS[name](shape(EXPECTED["model"]["repo"]), True)


# -- spoilt ------------------------------------------------------------------------------------------------------------


def off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a layer is one of the layer before."""
    raw = Names.raw
    monkeypatch.setattr(Names, "raw", lambda self, layer, component: raw(self, max(0, layer - 1), component))
    monkeypatch.setattr(attention, "_weights", lambda names, layer: names.attention(max(0, layer - 1)).output[1])
    monkeypatch.setattr(lens, "check", lambda names, ids: None)  # it would refuse, see below


def turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method has a sign wrong."""
    logits, read, add = Names.logits, Names.read, steering.add
    monkeypatch.setattr(Names, "logits", lambda self, state: -logits(self, state))
    monkeypatch.setattr(lens, "check", lambda names, ids: None)
    monkeypatch.setattr(
        Names,
        "read",
        lambda self, layer, part: -read(self, layer, part) if part == "neuron" else read(self, layer, part),
    )
    for module in (patching, attribution):
        monkeypatch.setattr(module, "difference", lambda row, answer, wrong: row[..., wrong] - row[..., answer])
    monkeypatch.setattr(steering, "add", lambda names, layers, shifts: add(names, layers, -shifts))
    monkeypatch.setattr(probing, "_decided", lambda scores: (scores[:, 0] < 0).long())
    monkeypatch.setattr(attention, "_weights", lambda names, layer: -names.attention(layer).output[1])


@pytest.mark.parametrize("name", CHECKS)
def test_a_wrong_layer_is_noticed(name: str, smol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_one(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name](smol, False)


@pytest.mark.parametrize("name", CHECKS)
def test_a_wrong_sign_is_noticed(name: str, smol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turned(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name](smol, False)
