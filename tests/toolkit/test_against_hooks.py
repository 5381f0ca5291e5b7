"""Every method on random GPT-2, Qwen3 and Gemma 3: what plain hooks compute, here; and the same bits at the service."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc import toolkit
from tests.support import models
from tests.support.stack import Stack

from .conftest import TINY
from .reference import Plain

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Rows side by side are added in another order than one by one."""
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "When Mary and John went to the store, John gave a drink to",
    "A fox",
]
CLEAN, CORRUPT, ANSWER, WRONG = [11, 42, 97, 230, 301, 77, 42], [11, 142, 97, 230, 31, 77, 9], 65, 300
LAYERS = [0, 2, 3]
COMPONENTS = ("residual", "attention", "mlp", "head")


@dataclass
class Subject:
    """One architecture: here with weights, as plain transformers, and as a client's shape."""

    here: Any
    plain: Plain
    there: Any

    @property
    def ids(self) -> list[list[int]]:
        return [self.here.tokenizer(prompt).input_ids for prompt in PROMPTS]


@pytest.fixture(params=TINY)
def subject(request: pytest.FixtureRequest, loaded: Any, shape: Any) -> Subject:
    name = models.repo_id(request.param)
    model = loaded(name)
    return Subject(model, Plain(model._module), shape(name))


def both(subject: Subject, connected: Stack, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result here, after the service gave the very same."""
    here = method(subject.here, *arguments, **options)
    there = method(subject.there, *arguments, **options, remote=True)
    same(here, there)
    return here


def same(one: Any, other: Any) -> None:
    ours, theirs = one._tensors(), other._tensors()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value.nan_to_num(-7.0), theirs[name].nan_to_num(-7.0)), name
    assert one._plain() == other._plain()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, **CLOSE, check_dtype=False)


@pytest.mark.parametrize("component", [*COMPONENTS, "neuron"])
def test_extract_activations(subject: Subject, connected: Stack, component: str) -> None:
    options: dict[str, Any] = {"layers": LAYERS, "positions": "all", "component": component}
    found = both(subject, connected, toolkit.extract_activations, PROMPTS, **options, batch_tokens=20)
    for prompt, ids in enumerate(subject.ids):
        assert found.there[prompt].sum() == len(ids)
        for number, layer in enumerate(LAYERS):
            wanted = subject.plain.activations(ids, layer, component)
            close(found.values[prompt, number, : len(ids)], wanted)
            assert not found.values[prompt, number, len(ids) :].any()


def test_positions_and_reductions(subject: Subject, connected: Stack) -> None:
    last = toolkit.extract_activations(subject.here, PROMPTS, layers=-1)
    some = toolkit.extract_activations(subject.here, PROMPTS, layers=3, positions=[0, -1])
    mean = both(subject, connected, toolkit.extract_activations, PROMPTS, layers=3, positions="all", reduction="mean")
    most = toolkit.extract_activations(subject.here, PROMPTS, layers=3, positions="all", reduction="max")
    for prompt, ids in enumerate(subject.ids):
        wanted = subject.plain.activations(ids, 3, "residual")
        close(last.values[prompt, 0, 0], wanted[-1])
        close(some.values[prompt, 0], wanted[[0, -1]])
        close(mean.values[prompt, 0, 0], wanted.mean(0))
        close(most.values[prompt, 0, 0], wanted.amax(0))


def test_logit_lens(subject: Subject, connected: Stack) -> None:
    options: dict[str, Any] = {"positions": "all", "top": 3, "tokens": [65, 300]}
    found = both(subject, connected, toolkit.logit_lens, PROMPTS, **options)
    for prompt, ids in enumerate(subject.ids):
        for layer in found.layers:
            wanted = subject.plain.lens(ids, layer)
            close(found.probabilities[prompt, layer, : len(ids)], wanted.topk(3).values)
            close(found.followed[prompt, layer, : len(ids)], wanted[:, [65, 300]])
        own = subject.plain.logits(ids).softmax(-1)
        close(found.followed[prompt, -1, : len(ids)], own[:, [65, 300]])
        assert found.ids[prompt, -1, len(ids) - 1, 0] == own[-1].argmax()
        assert found.words[prompt][-1][len(ids) - 1][0] == subject.here.tokenizer.decode([int(own[-1].argmax())])


def test_a_lens_holds_a_part_of_the_vocabulary_numbers_at_a_time(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(models.repo_id("gpt2"))
    whole = toolkit.logit_lens(model, PROMPTS, positions="all", tokens=[65])
    monkeypatch.setattr("edif_hpc.toolkit.lens.VOCABULARY_NUMBERS", 3 * 512)
    parts = toolkit.logit_lens(model, PROMPTS, positions="all", tokens=[65])
    close(parts.probabilities, whole.probabilities)
    close(parts.followed, whole.followed)
    assert torch.equal(parts.ids, whole.ids)


@pytest.mark.parametrize("component", COMPONENTS)
def test_activation_patching(subject: Subject, connected: Stack, component: str) -> None:
    options: dict[str, Any] = {"layers": LAYERS, "positions": [1, -1], "component": component, "batch_tokens": 30}
    found = both(
        subject, connected, toolkit.activation_patching, [CLEAN], [CORRUPT], answer=ANSWER, wrong=WRONG, **options
    )
    clean, corrupt = subject.plain.logits(CLEAN)[-1], subject.plain.logits(CORRUPT)[-1]
    close(found.clean[0], clean[ANSWER] - clean[WRONG])
    close(found.corrupt[0], corrupt[ANSWER] - corrupt[WRONG])
    close(found.corrupt_kl[0], divergence(clean, corrupt))
    for number, layer in enumerate(LAYERS):
        for column, place in enumerate((1, len(CORRUPT) - 1)):
            for head in range(subject.plain.heads) if component == "head" else [None]:
                logits = subject.plain.patched(CLEAN, CORRUPT, component, (layer, place, head))
                at = (0, number, column) if head is None else (0, number, column, head)
                close(found.difference[at], logits[ANSWER] - logits[WRONG])
                close(found.kl[at], divergence(clean, logits))


def divergence(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(other.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="sum")


@pytest.mark.parametrize("component", COMPONENTS)
def test_attribution_patching(subject: Subject, connected: Stack, component: str) -> None:
    options: dict[str, Any] = {"layers": LAYERS, "component": component, "answer": ANSWER, "wrong": WRONG}
    found = both(subject, connected, toolkit.attribution_patching, [CLEAN], [CORRUPT], **options)
    for number, layer in enumerate(LAYERS):
        wanted = subject.plain.attribution(CLEAN, CORRUPT, component, layer, ANSWER, WRONG)
        torch.testing.assert_close(found.effect[0, number], wanted, rtol=1e-3, atol=1e-4)


def test_attention_patterns(subject: Subject, connected: Stack) -> None:
    repeated = [5, 9, 200, 77, 5, 9, 31, 200]
    asked = [subject.ids[0], repeated]
    scores = ["previous", "first", "induction"]
    found = both(subject, connected, toolkit.attention_patterns, asked, layers=LAYERS, heads=[1, 3], scores=scores)
    for prompt, ids in enumerate(asked):
        for number, layer in enumerate(LAYERS):
            wanted = subject.plain.attention(ids, layer)[[1, 3]]
            own = found.patterns[prompt, number, :, : len(ids), : len(ids)]
            close(own, wanted)
            close(own.sum(-1), torch.ones(2, len(ids)))
            close(found.scores["first"][prompt, number], wanted[:, 1:, 0].mean(-1))
            close(
                found.scores["previous"][prompt, number],
                torch.stack([wanted[:, place, place - 1] for place in range(1, len(ids))]).mean(0),
            )
    behind = torch.stack([subject.plain.attention(repeated, 2)[:, at, to] for at, to in ((4, 1), (5, 2), (7, 3))])
    close(found.scores["induction"][1, 1], behind.mean(0)[[1, 3]])


@pytest.mark.parametrize("name", TINY)
def test_half_precision_comes_close(name: str, loaded: Any, cache: Path) -> None:
    from nnsight.modeling.transformers import TransformersModel

    options: dict[str, Any] = {"task": "text-generation", "attn_implementation": "eager", "dispatch": True}
    half = TransformersModel(models.repo_id(name), dtype=torch.bfloat16, **options)
    whole = loaded(models.repo_id(name))
    pair: dict[str, Any] = {"answer": ANSWER, "wrong": WRONG, "layers": LAYERS}
    loose = {"rtol": 0.1, "atol": 0.1}

    found = toolkit.extract_activations(half, PROMPTS, layers=2)
    assert found.values.dtype is torch.bfloat16
    assert found.record["dtype"] == "bfloat16"
    ones = toolkit.extract_activations(whole, PROMPTS, layers=2).values
    assert torch.cosine_similarity(found.values.float(), ones, dim=-1).min() > 0.99
    lenses = [toolkit.logit_lens(model, PROMPTS, tokens=[65]).followed for model in (half, whole)]
    torch.testing.assert_close(*lenses, **loose)
    for method in (toolkit.activation_patching, toolkit.attribution_patching):
        told = [method(model, [CLEAN], [CORRUPT], **pair) for model in (half, whole)]
        torch.testing.assert_close(told[0].clean, told[1].clean, **loose)
        assert all(value.dtype is torch.float32 for value in told[0]._tensors().values())
    maps = [toolkit.attention_patterns(model, PROMPTS).patterns for model in (half, whole)]
    torch.testing.assert_close(*maps, **loose)
    vector = toolkit.steering_vector(half, PROMPTS[:2], PROMPTS[2:], layers=1)
    assert vector.values.dtype is torch.float32
    assert toolkit.steer(half, "A", vector, new_tokens=2).kl.isfinite().all()


def test_attention_is_eager_for_as_long_as_it_takes(connected: Stack) -> None:
    from nnsight.modeling.transformers import TransformersModel

    model = TransformersModel(models.repo_id("qwen3"), task="text-generation", dtype=torch.float32, dispatch=True)
    assert model.attn_implementation == "sdpa"
    found = toolkit.attention_patterns(model, PROMPTS[0], layers=1)
    assert model.attn_implementation == "sdpa"
    assert found.record["attention"] == "eager"
    there = TransformersModel(models.repo_id("qwen3"), task="text-generation")
    same(found, toolkit.attention_patterns(there, PROMPTS[0], layers=1, remote=True))


@pytest.mark.parametrize("by", ["absolute", "value"])
def test_top_neurons(subject: Subject, connected: Stack, by: str) -> None:
    found = both(subject, connected, toolkit.top_neurons, PROMPTS, layers=LAYERS, top=4, by=by, batch_tokens=20)
    for prompt, ids in enumerate(subject.ids):
        for number, layer in enumerate(LAYERS):
            active = subject.plain.activations(ids, layer, "neuron")[-1]
            wanted = (active.abs() if by == "absolute" else active).topk(4).indices
            assert found.ids[prompt, number, 0].tolist() == wanted.tolist()
            close(found.values[prompt, number, 0], active[wanted])


def test_steering(subject: Subject, connected: Stack) -> None:
    vector = both(subject, connected, toolkit.steering_vector, PROMPTS[:2], PROMPTS[2:], layers=[1, 2])
    ends = [subject.plain.activations(ids, 2, "residual")[-1] for ids in subject.ids]
    close(vector.values[1], (ends[0] + ends[1]) / 2 - ends[2])

    options: dict[str, Any] = {"factors": [0.0, -3.0, 3.0], "new_tokens": 4, "answer": 65, "wrong": 300}
    found = both(subject, connected, toolkit.steer, PROMPTS[:2], vector.only(2), **options)
    assert not found.kl[:, 0].abs().max() > 1e-6
    for prompt, ids in enumerate(subject.ids[:2]):
        plain = subject.plain.logits(ids)[-1]
        for number, factor in enumerate(options["factors"]):
            shift = factor * vector.values[1]
            logits = subject.plain.steered(ids, 2, shift)
            close(found.difference[prompt, number], logits[65] - logits[300])
            torch.testing.assert_close(found.kl[prompt, number], divergence(plain, logits), rtol=1e-3, atol=1e-4)
            written = subject.plain.written(ids, 2, shift, 4)
            assert found.texts[prompt][number] == subject.here.tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_steering_in_batches(name: str, budget: int, loaded: Any) -> None:
    """Prompts of many lengths and all factors, side by side as far as the budget goes, give what one by one gives."""
    model = loaded(models.repo_id(name))
    plain, new = Plain(model._module), 3
    ids = [[11, 42, 97], [5, 9, 200, 77, 31], [7], [42, 11, 97], [230, 301, 77, 9, 12]]
    vector = toolkit.SteeringVector(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), [2])
    seen: list[tuple[int, int]] = []
    count = plain.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    try:
        found = toolkit.steer(
            model, ids, vector, factors=[2.0, 0.0, -2.0], new_tokens=new, answer=65, wrong=300, batch_tokens=budget
        )
    finally:
        count.remove()
    assert all(rows * tokens <= budget for rows, tokens in seen if rows > 1)
    if budget == 4096:
        assert seen[0] == (len(ids) * 3, 5)  # all at once, each without steering only once
        assert len(seen) == 1 + 3 * new  # and written by length
    assert not found.kl[:, 1].any()
    for prompt, each in enumerate(ids):
        own = plain.logits(each)[-1]
        for number, factor in enumerate(found.factors):
            logits = plain.steered(each, 2, factor * vector.values[0])
            close(found.difference[prompt, number], logits[65] - logits[300])
            torch.testing.assert_close(found.kl[prompt, number], divergence(own, logits), rtol=1e-3, atol=1e-4)
            written = plain.written(each, 2, factor * vector.values[0], new)
            assert found.texts[prompt][number] == model.tokenizer.decode(written, skip_special_tokens=True)


def test_as_much_is_written_as_the_model_takes(loaded: Any) -> None:
    model = loaded(models.repo_id("gpt2"))
    vector = toolkit.SteeringVector(torch.zeros(1, 64), [2])
    assert toolkit.steer(model, [[1] * 250], vector, factors=1.0, new_tokens=7).kl.isfinite().all()


def test_pairs_that_decide_nothing_are_told(loaded: Any) -> None:
    model = loaded(models.repo_id("gpt2"))
    here = {"answer": ANSWER, "wrong": WRONG, "layers": 2}
    clean, corrupt = [CLEAN, CLEAN], [CORRUPT, CORRUPT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edif_hpc.toolkit._pairs.LEAST_APART", math.inf)
        for method in (toolkit.activation_patching, toolkit.attribution_patching):
            with pytest.warns(UserWarning, match=r"both runs of 2 of 2 pairs \(0, 1\): their recovery is NaN"):
                assert method(model, clean, corrupt, **here).recovery.isnan().all()
