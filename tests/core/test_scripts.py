"""What is known of a script before it runs, and what its values become: all without a service."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from edif_hpc.core.errors import EdifError, EnvelopeError, ModelError, ModelKeyError, SavedError
from edif_hpc.core.scripts import files
from edif_hpc.core.scripts.envelope import NamedModel, ScriptEnvelope
from edif_hpc.core.scripts.found import models_in
from edif_hpc.core.scripts.payload import Script
from edif_hpc.core.scripts.plain import plain
from edif_hpc.core.target import Target

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("m = TransformersModel('a/b')", [("a/b", None, None)]),
        ("import nnsight\nm = nnsight.LanguageModel('a/b', device_map='auto')", [("a/b", None, "text-generation")]),
        ("m = TransformersModel(repo_id='a/b', task='fill-mask', revision='v1')", [("a/b", "v1", "fill-mask")]),
        ("from nnsight import VisionLanguageModel as V\nV('a/b')", [("a/b", None, "image-text-to-text")]),
        ("N: str = 'a/b'\ndef f():\n    return LanguageModel(N)", [("a/b", None, "text-generation")]),
        ("LanguageModel('c/d')\nLanguageModel('a/b')\nLanguageModel('c/d')",
         [("c/d", None, "text-generation"), ("a/b", None, "text-generation")]),
        ("LanguageModel('a/b', revision=None)", [("a/b", None, "text-generation")]),
    ],
)  # fmt: skip
def test_models_are_found_in_the_source(source: str, expected: list[tuple[str, str | None, str | None]]) -> None:
    assert [(model.repo_id, model.revision, model.task) for model in models_in(source)] == expected


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("print('LanguageModel')", ModelError, "builds no model that can be seen"),
        ("LanguageModel(sys.argv[1])", ModelError, "in line 1 is only known when it runs"),
        ("\nLanguageModel(f'a/{size}')", ModelError, "in line 2 is only known when it runs"),
        ("N = 'a'\nN = 'b'\nLanguageModel(N)", ModelError, "in line 3 is only known when it runs"),
        ("for N in ('a', 'b'):\n    LanguageModel(N)", ModelError, "in line 2 is only known when it runs"),
        ("N = 'a'\ndef f(N):\n    return LanguageModel(N)", ModelError, "in line 3 is only known when it runs"),
        ("N = 'a'\nfrom names import M as N\nLanguageModel(N)", ModelError, "in line 3 is only known when it runs"),
        ("N = 'a'\ntry:\n    f()\nexcept OSError as N:\n    LanguageModel(N)", ModelError, "in line 5 is only known"),
        ("N = 'a'\nmatch f():\n    case [N, *_]:\n        LanguageModel(N)", ModelError, "in line 4 is only known"),
        ("LanguageModel('a/b', revision=pick())", ModelError, "is only known when it runs"),
        ("LanguageModel(*names)", ModelError, "is only known when it runs"),
        ("LanguageModel()", ModelError, "is only known when it runs"),
        ("x = (", EnvelopeError, "x.py is no Python in line 1"),
        ("a\0b", EnvelopeError, "x.py is no Python"),
    ],
)
def test_what_cannot_be_told_is_said(source: str, kind: type[EdifError], words: str) -> None:
    with pytest.raises(kind, match=words):
        models_in(source, "x.py")


def test_a_payload_is_what_was_packed_or_refused() -> None:
    script = Script("print(1)", "a.py", ["--x", "ü"])
    assert Script.unpack(script.pack()) == script
    for broken in (b"", b"[]", b"{}", b"\x80\x04.", b'{"source": 1, "file": "", "arguments": []}',
                   b'{"source": "", "file": "", "arguments": [1]}', b"[" * 100_000):  # fmt: skip
        with pytest.raises(EnvelopeError, match="no script"):
            Script.unpack(broken)


def test_an_envelope_names_each_model_once_and_nothing_strange() -> None:
    models = [
        {"repo_id": "b/b"},
        {"repo_id": "a/a", "task": "fill-mask"},
        {"repo_id": "b/b", "task": "text-generation"},
    ]
    keys = ScriptEnvelope.read(json.dumps({"models": models, "unknown": 1})).keys()
    assert [(key.repo_id, key.task) for key in keys] == [("b/b", "text-generation"), ("a/a", "fill-mask")]
    with pytest.raises(ModelKeyError, match="cannot name one on the Hub"):
        NamedModel(repo_id="../secrets").key()
    few = {"models": models}
    wrong = [{"models": []}, {"models": models * 3}, {"models": [{"repo_id": "a/a", "class": "b"}]}]
    for fields in (*wrong, few | {"form": "exe"}, few | {"seconds": -1}, few | {"name": "a\nb"}):
        with pytest.raises(EnvelopeError, match="wrong at"):
            ScriptEnvelope.read(json.dumps(fields))


def test_a_target_is_the_same_for_whoever_needs_the_same() -> None:
    one, other = NamedModel(repo_id="a/a").key(), NamedModel(repo_id="b/b").key()
    both = Target.of([other, one, other], "gpus")
    assert both == Target.of([one, other], "gpus") == Target.parse(str(both))
    assert (both.name, both.pool, both.single) == ("a/a + b/b", "gpus", False)
    assert str(Target.of([one])) == str(one)
    assert Target.parse(str(one)).single
    assert not Target.of([one], "gpus").single
    with pytest.raises(ModelKeyError):
        Target.parse("pool gpus")


VALUES: dict[str, Any] = {
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "view": torch.arange(6, dtype=torch.int32).reshape(2, 3).T,
    "numbers": [1, 2.5],
    "inner": {"flag": True, "list": [torch.zeros(1), "text"]},
    "empty": np.zeros((0, 2), np.float16),
    "scalar": torch.tensor(3.0).requires_grad_(),
}


def test_safetensors_and_npz_hold_what_was_saved() -> None:
    from safetensors.torch import load

    kept = {name: plain(name, value) for name, value in VALUES.items()}
    tensors = load(files.written(kept, "safetensors"))
    assert torch.equal(tensors["half"], VALUES["half"])
    assert torch.equal(tensors["view"], VALUES["view"])
    assert tensors["scalar"].shape == ()
    assert tensors["empty"].shape == (0, 2)
    assert tensors["inner.flag"].item() is True
    with np.load(io.BytesIO(files.written(kept, "npz"))) as arrays:
        assert arrays["half"].tolist() == [[1.5, -2.0]]
        assert arrays["view"].tolist() == VALUES["view"].tolist()
        assert arrays["inner.list.1"].item() == "text"
        assert set(arrays) == {
            "half",
            "view",
            "numbers",
            "inner.flag",
            "inner.list.0",
            "inner.list.1",
            "empty",
            "scalar",
        }


def test_json_is_json_whatever_the_numbers_are() -> None:
    kept = {"a": plain("a", torch.tensor([1.0, math.nan, math.inf])), "b": plain("b", (None, {"c": np.int64(4)}))}
    assert json.loads(files.written(kept, "json")) == {"a": [1.0, None, None], "b": [None, {"c": 4}]}


def test_parquet_is_one_table() -> None:
    from pyarrow import parquet

    def table(**values: Any) -> dict[str, Any]:
        kept = {name: plain(name, value) for name, value in values.items()}
        found: dict[str, Any] = parquet.read_table(io.BytesIO(files.written(kept, "parquet"))).to_pydict()
        return found

    assert table(a=torch.ones(2, 1, 2), b=["x", None]) == {"a": [[[1.0, 1.0]], [[1.0, 1.0]]], "b": ["x", None]}
    assert table(rows=[{"a": 1}, {"a": 2, "b": "x"}]) == {"a": [1, 2], "b": [None, "x"]}
    assert table(columns={"a": [1, 2], "b": [3, 4]}) == {"a": [1, 2], "b": [3, 4]}
    assert table(loss=0.5, name="run") == {"loss": [0.5], "name": ["run"]}
    with pytest.raises(SavedError, match="of one length: 'a' has 2, 'b' has 3"):
        table(a=[1, 2], b=[1, 2, 3])
    with pytest.raises(SavedError, match="take another suffix"):
        table(a=[1, "two"])


def test_a_value_is_what_it_was_when_it_was_saved() -> None:
    tensor, array = torch.ones(2), np.ones(2)
    kept = {"tensor": plain("tensor", tensor), "array": plain("array", array)}
    tensor.zero_()
    array[:] = 0
    assert json.loads(files.written(kept, "json")) == {"tensor": [1.0, 1.0], "array": [1.0, 1.0]}


def test_what_no_file_can_hold_is_named() -> None:
    with pytest.raises(SavedError, match="The value 'a' is a object"):
        plain("a", object())
    with pytest.raises(SavedError, match="The value 'a' is a list, or holds something"):
        plain("a", [object()])
    with pytest.raises(SavedError, match="The value 'a' is None"):
        files.check("a", None, "npz")
    with pytest.raises(SavedError, match=r"of complex128, which a \.safetensors file cannot hold"):
        files.check("a", plain("a", np.ones(1, np.complex128)), "safetensors")
    with pytest.raises(SavedError, match=r"come to the name 'a\.b'"):
        files.written({"a": {"b": 1}, "a.b": 2}, "npz")
    with pytest.raises(SavedError, match="too large"):
        files.check("a", 2**70, "npz")
