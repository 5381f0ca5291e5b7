"""Parameters of methods, checked where there is no torch: what is wrong is told in one sentence with what to do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import METHODS, ActivationPatching, LogitLens, Probe, Steer, parse

pytestmark = pytest.mark.fast

PAIR = {"clean": "a", "corrupt": "b", "answer": "x", "wrong": "y"}
TWO = {"prompts": ["a", "b"], "labels": [1, 0]}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("logitlens", {}, "did you mean 'logit-lens'?"),
    ("lens of mine", {}, "there are activation-patching, "),
    ("logit-lens", {}, "logit-lens needs 'prompts': Texts, or lists of token ids."),
    ("logit-lens", {"prompts": "a", "topp": 3}, "no parameter 'topp'; did you mean 'top'?"),
    ("logit-lens", {"prompts": "a", "top": 0}, "top is 0, which cannot be used; it takes: How many"),
    ("logit-lens", {"prompts": []}, "prompts is []"),
    ("logit-lens", {"prompts": ["a", ""]}, "prompts is ['a', '']"),
    ("logit-lens", {"prompts": "a", "positions": "first"}, "it takes: last, all, or a list of token numbers"),
    ("logit-lens", {"prompts": "a", "layers": []}, "layers is []"),
    ("extract-activations", {"prompts": "a", "component": "resid"}, "it takes: residual, attention, mlp, head"),
    ("activation-patching", {**PAIR, "corrupt": ["b", "c"]}, "1 clean and 2 corrupt prompts; each pair needs both"),
    ("activation-patching", {**PAIR, "heads": [1]}, "ask for component 'head'"),
    ("attribution-patching", {**PAIR, "answer": ["x", "y"]}, "answer has 2 words for 1 pairs"),
    ("probe", {**TWO, "labels": [1, 1]}, "all labels are 1; a probe needs two classes"),
    ("probe", {**TWO, "labels": [1, 0, 1]}, "there are 3 labels for 2 prompts; give one each"),
    ("probe", {**TWO, "positions": "all"}, "choose one position, or reduction mean or max"),
    ("probe", {**TWO, "held_out": 2}, "held_out is 2, which cannot be used; it takes: A share between 0 and 1"),
    ("probe", {**TWO, "held_out": [True, False]}, "no prompt of class 1 is trained on; change held_out"),
    ("probe", {"prompts": "abc", "labels": [0, 1, 2], "kind": "mass_mean"}, "mass_mean tells two classes apart"),
    ("steer", {"prompts": "a", "positive": "b", "negative": "c", "layers": 3, "answer": "x"}, "give both or neither"),
    ("attention-patterns", {"prompts": "a", "patterns": False}, "set one of them"),
    ("probe", {**TWO, "penalty": float("nan")}, "penalty is nan, which cannot be used"),
    ("steer", {"prompts": "a", "positive": "b", "negative": "c", "layers": 3, "factors": "inf"}, "factors is 'inf'"),
]


@pytest.mark.parametrize(("name", "parameters", "said"), WRONG)
def test_a_mistake_is_one_sentence(name: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError) as caught:
        parse(name, parameters)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.http_status == 422
    assert isinstance(caught.value, ValueError)


def test_defaults_and_spellings() -> None:
    lens = parse("logit_lens", {"prompts": "a", "layers": 3, "batch-tokens": 7})
    assert lens == LogitLens(prompts=["a"], layers=[3], positions="last", top=5, tokens=[], batch_tokens=7)
    assert parse("activation-patching", PAIR) == ActivationPatching(
        clean=["a"], corrupt=["b"], answer=["x"], wrong=["y"], component="residual", positions="all"
    )
    assert isinstance(parse("probe", {"prompts": [[1, 2], [3]], "labels": ["yes", "no"]}), Probe)
    steer = parse("steer", {"prompts": "a", "positive": ["b"], "negative": ["c"], "layers": 15})
    assert isinstance(steer, Steer)
    assert steer.factors == [0.0, 1.0]


def test_every_method_is_described() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.gives.endswith("."), name
        for field, about in method.model_fields.items():
            assert about.description, f"{name}.{field}"
            assert about.description.endswith("."), f"{name}.{field}"


def test_no_torch_is_imported() -> None:
    script = "import sys, edif_hpc.core.methods; assert not {'torch', 'nnsight', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
