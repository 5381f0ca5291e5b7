"""Steps that follow each other within one request, other ways to the service, and calls that are refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

import edif_hpc
from edif_hpc import toolkit
from edif_hpc.client import _loading
from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import METHODS
from edif_hpc.toolkit import _result, load, run_method
from tests.support import models
from tests.support.stack import Stack

from .test_against_hooks import same

PROMPTS = ["A great day", "A lovely book", "A bad day", "A poor book"]
LABELS = [1, 1, 0, 0]
OUT = [False, True, False, True]


@pytest.fixture
def gpt2(shape: Any) -> Any:
    return shape(models.repo_id("gpt2"))


def chain(model: Any, prompts: list[str]) -> tuple[Any, Any, Any]:
    """Read, learn, steer with what was learnt."""
    found = toolkit.extract_activations(model, prompts)
    learnt = toolkit.probe(found, LABELS, held_out=OUT)
    moved = toolkit.steer(model, "The", toolkit.SteeringVector.of(learnt).only(2), factors=[0, 4], new_tokens=3)
    return found, learnt, moved


def test_steps_chain_within_one_request(gpt2: Any, connected: Stack, loaded: Any) -> None:
    here = chain(loaded(models.repo_id("gpt2")), PROMPTS)
    toolkit.top_neurons(gpt2, PROMPTS, remote=True)
    (before,) = edif_hpc.requests(limit=1)
    with gpt2.session(remote=True):
        found = toolkit.extract_activations(gpt2, PROMPTS)
        learnt = toolkit.probe(found, LABELS, held_out=OUT).save()
        moved = toolkit.steer(gpt2, "The", toolkit.SteeringVector.of(learnt).only(2), factors=[0, 4], new_tokens=3)
        moved.save()
    assert "found" not in locals()  # nothing but what was marked comes back
    assert [each.id for each in edif_hpc.requests(limit=2)][1] == before.id  # one request in all
    assert isinstance(learnt, toolkit.Probe)
    same(learnt, here[1])
    same(moved, here[2])


def test_results_mix_with_traces(gpt2: Any, connected: Stack) -> None:
    with gpt2.session(remote=True):
        found = toolkit.extract_activations(gpt2, PROMPTS[0], layers=1)
        with gpt2.trace(PROMPTS[0]):
            away = (gpt2.transformer.h[1].output[0, -1] - found.values[0, 0, 0]).abs().max().item()
        nnsight.save(away)
    assert away < 1e-5


def test_what_came_back_goes_into_the_next_request(gpt2: Any, connected: Stack, loaded: Any) -> None:
    here = chain(loaded(models.repo_id("gpt2")), PROMPTS)
    learnt = toolkit.probe(toolkit.extract_activations(gpt2, PROMPTS, remote=True), LABELS, held_out=OUT)
    with gpt2.session(remote=True):
        vector = toolkit.SteeringVector.of(learnt).only(2)
        moved = toolkit.steer(gpt2, "The", vector, factors=[0, 4], new_tokens=3).save()
    same(moved, here[2])


def test_the_stock_client(gpt2: Any, stock: Stack, loaded: Any) -> None:
    there = toolkit.logit_lens(gpt2, PROMPTS, remote=True)
    same(there, toolkit.logit_lens(loaded(models.repo_id("gpt2")), PROMPTS))
    same(there, toolkit.logit_lens(gpt2, PROMPTS, remote=stock.url))
    with gpt2.session(remote=True):
        again = toolkit.logit_lens(gpt2, PROMPTS).save()
    same(there, again)


def test_by_name(gpt2: Any, connected: Stack, loaded: Any) -> None:
    pair = {"clean": [[1, 2, 3]], "corrupt": [[1, 4, 3]], "answer": 5, "wrong": 6, "layers": 1}
    sets = {"positive": PROMPTS[:2], "negative": PROMPTS[2:], "layers": [2]}
    asked: dict[str, dict[str, Any]] = {
        "extract-activations": {"prompts": PROMPTS},
        "logit-lens": {"prompts": PROMPTS},
        "activation-patching": pair,
        "attribution-patching": pair,
        "probe": {"prompts": PROMPTS, "labels": LABELS, "held_out": OUT},
        "steering-vector": sets,
        "steer": {"prompts": "The", **sets, "new-tokens": 2},
        "top-neurons": {"prompts": PROMPTS},
        "attention-patterns": {"prompts": PROMPTS, "scores": ["first"]},
    }
    assert asked.keys() == METHODS.keys()
    for name, parameters in asked.items():
        there = run_method(name, gpt2, parameters, remote=True)
        same(there, run_method(name, loaded(models.repo_id("gpt2")), parameters))
        assert there.record["method"] == name
        assert there.record["model"] == models.repo_id("gpt2")
        assert there.record["dtype"] == "float32"
        assert {"python", "nnsight", "torch", "transformers", "edif-hpc"} == there.record["versions"].keys()


def test_every_result_is_on_the_clients_list() -> None:
    for kind in _result.KINDS.values():
        assert kind.__name__ in _loading.EXACT[kind.__module__]
    listed = {name for module, names in _loading.EXACT.items() if "toolkit" in module for name in names}
    assert listed == _result.KINDS.keys()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("logit_lens", {"prompts": "a b", "layers": 4}, "There is no layer 4: the model has 4, numbered from 0 to 3."),
    ("logit_lens", {"prompts": ["a b", "a"], "positions": 3}, "There is no token 3 in prompt"),
    (
        "logit_lens",
        {"prompts": "a", "tokens": "Colosseum Tower"},
        "' Tower']), and one is needed; take another word.",
    ),
    (
        "logit_lens",
        {"prompts": "a", "tokens": 999_999},
        "There is no token 999999: the model has 512, numbered from 0 to 511.",
    ),
    ("logit_lens", {"prompts": [[1, 512]]}, "Prompt 0 has the token 512, and there are 512."),
    ("logit_lens", {"prompts": [[1] * 257]}, "Prompt 0 has 257 tokens, and the model takes 256; shorten it."),
    (
        "activation_patching",
        {"clean": [[1, 2]], "corrupt": [[1, 2, 3]], "answer": 1, "wrong": 2},
        "The prompts of pair 0 have 2 and 3 tokens",
    ),
    (
        "attribution_patching",
        {"clean": [[1, 2], [1]], "corrupt": [[1, 2], [3]], "answer": 1, "wrong": 2},
        "name positions from the end",
    ),
    ("attention_patterns", {"prompts": "a", "heads": 4}, "There is no head 4: the model has 4, numbered from 0 to 3."),
    ("top_neurons", {"prompts": "a", "topp": 3}, "unexpected keyword"),
    (
        "logit_lens",
        {"prompts": "a", "top": 1000},
        "top is 1000, and there are 512 tokens in the model's vocabulary; ask for 512 at most.",
    ),
    ("top_neurons", {"prompts": "a", "top": 1000}, "top is 1000, and there are 256 neurons in the MLP of layer 0"),
    ("logit_lens", {"prompts": "a", "tokens": [True]}, "tokens is [True], which cannot be used"),
    (
        "activation_patching",
        {"clean": [[1, 2], [3, 4]], "corrupt": [[1, 3], [3, 4]], "answer": 1, "wrong": 2},
        "The prompts of pair 1 are the same, token for token",
    ),
    (
        "attribution_patching",
        {"clean": [[1, 2]], "corrupt": [[1, 3]], "answer": 7, "wrong": 7},
        "Answer and wrong word of pair 0 are the same token, 7",
    ),
    (
        "steer",
        {"prompts": [[1] * 250], "vector": toolkit.SteeringVector(torch.zeros(1, 64), [1]), "new_tokens": 8},
        "Prompt 0 has 250 tokens and 8 are to be written, and the model takes 256; write at most 7, or shorten it.",
    ),
    ("steer", {"prompts": "a", "vector": torch.zeros(1, 64)}, "steer adds a SteeringVector, not a Tensor"),
]


@pytest.mark.parametrize(("name", "parameters", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_it_is_sent(
    name: str, parameters: dict[str, Any], said: str, shape: Any
) -> None:
    with pytest.raises((MethodError, TypeError)) as caught:
        getattr(toolkit, name)(shape(models.repo_id("gpt2")), **parameters, remote="http://127.0.0.1:1")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "thing", ["edif-test/gpt2", None, torch.nn.Linear(2, 2), nnsight.NNsight(torch.nn.Linear(2, 2))]
)
def test_what_is_no_model_of_text_is_one_sentence(thing: Any) -> None:
    pair = {"clean": [[1, 2]], "corrupt": [[1, 3]], "answer": 1, "wrong": 2}
    for call in (
        lambda: toolkit.logit_lens(thing, "a"),
        lambda: toolkit.extract_activations(thing, "a"),
        lambda: toolkit.attention_patterns(thing, "a"),
        lambda: toolkit.top_neurons(thing, "a"),
        lambda: toolkit.activation_patching(thing, **pair),
        lambda: toolkit.attribution_patching(thing, **pair),
        lambda: toolkit.steering_vector(thing, "a", "b"),
        lambda: toolkit.steer(thing, "a", toolkit.SteeringVector(torch.zeros(1, 64), [1])),
    ):
        with pytest.raises(MethodError, match="The first argument is an nnsight model of text"):
            call()


def test_a_method_within_a_session_is_not_sent_by_itself(gpt2: Any, connected: Stack) -> None:
    with pytest.raises(Exception, match="leave remote= out here") as caught, gpt2.session(remote=True):
        toolkit.logit_lens(gpt2, PROMPTS[0], remote=True).save()
    assert "token" not in str(caught.value).splitlines()[-1]


def test_gradients_whatever_the_caller_has(loaded: Any) -> None:
    model = loaded(models.repo_id("gpt2"))
    pair: dict[str, Any] = {"clean": [[1, 2, 3]], "corrupt": [[1, 4, 3]], "answer": 5, "wrong": 6, "layers": [1, 2]}
    wanted = toolkit.attribution_patching(model, **pair)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            same(toolkit.attribution_patching(model, **pair), wanted)


def test_a_mixture_of_experts_has_no_such_neurons(shape: Any) -> None:
    mixtral = shape(models.repo_id("mixtral"))
    with pytest.raises(MethodError, match="no MLP's last map under a name that is known here"):
        toolkit.top_neurons(mixtral, "a", remote="http://127.0.0.1:1")


def test_names_that_a_user_gave_are_found(cache: Path) -> None:
    from nnsight.modeling.transformers import TransformersModel

    renamed = TransformersModel(
        models.repo_id("gpt2"), task="text-generation", dispatch=True, dtype=torch.float32, rename={"h": "layers"}
    )
    assert toolkit.extract_activations(renamed, "a b", layers=1).values.shape[-1] == 64


def test_a_lens_that_would_mislead_is_refused(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(models.repo_id("qwen3"))
    logits = toolkit.lens.Names.logits
    monkeypatch.setattr(toolkit.lens.Names, "logits", lambda self, state: 2 * logits(self, state))
    with pytest.raises(MethodError, match="does more between its last layer and its logits"):
        toolkit.logit_lens(model, "a b")


def test_a_vector_of_another_model_is_refused(shape: Any) -> None:
    vector = toolkit.SteeringVector(values=torch.zeros(1, 32), layers=[1])
    with pytest.raises(MethodError, match="32 wide"):
        toolkit.steer(shape(models.repo_id("gpt2")), "a", vector, remote="http://127.0.0.1:1")


def test_kept_results_go_on(gpt2: Any, connected: Stack, tmp_path: Path) -> None:
    found = toolkit.extract_activations(gpt2, PROMPTS, remote=True).save(tmp_path / "found.safetensors")
    again = load(tmp_path / "found.safetensors")
    assert isinstance(again, toolkit.Activations)
    same(toolkit.probe(again, LABELS, held_out=OUT), toolkit.probe(found, LABELS, held_out=OUT))
