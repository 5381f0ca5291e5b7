"""Methods by name: what comes back is what the toolkit gives here, bit for bit; what is wrong is told beforehand."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edif_hpc import toolkit
from edif_hpc.core.methods import METHODS
from edif_hpc.core.scripts.plain import META

from .laptop import Laptop

GPT2 = "edif-test/gpt2"
CITIES = [
    "The Eiffel Tower is located in the city of",
    "The Colosseum is in",
    "A short one",
    "Once upon a time there was",
]
PAIR = {"clean": ["a b c d"], "corrupt": ["a b e d"], "answer": [5], "wrong": [7]}
SETS = {"positive": ["I love this", "how nice"], "negative": ["I hate this", "how bad"]}
ASKED: dict[str, dict[str, Any]] = {
    "activation-patching": {**PAIR, "component": "head", "layers": [0, -1], "positions": "last"},
    "attention-patterns": {"prompts": CITIES[:1], "layers": [1], "scores": ["previous", "first"]},
    "attribution-patching": {**PAIR, "component": "mlp"},
    "extract-activations": {"prompts": CITIES, "layers": [2], "positions": "all", "batch_tokens": 16},
    "logit-lens": {"prompts": CITIES, "tokens": [3], "top": 3, "positions": [0, -1]},
    "probe": {"prompts": CITIES * 2, "labels": ["a", "b", "c", "b"] * 2, "layers": [0, 3], "held_out": 0.5, "seed": 3},
    "steer": {**SETS, "prompts": CITIES[1:3], "layers": [1], "factors": [0, 2.5], "new_tokens": 3},
    "steering-vector": {**SETS, "normalised": True},
    "top-neurons": {"prompts": CITIES[:2], "top": 2},
}


@pytest.fixture(scope="module")
def gpt2(cache: Path) -> Iterator[Any]:
    """The model in this process, with as many threads as the service computes with."""
    from nnsight.modeling.transformers import TransformersModel

    snapshot = next((cache / f"models--{GPT2.replace('/', '--')}" / "snapshots").iterdir())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = TransformersModel(str(snapshot), task="text-generation", dtype=torch.float32, dispatch=True)
    model._module.requires_grad_(False)
    yield model
    torch.set_num_threads(before)


def submit(laptop: Laptop, method: str, *options: str | Path, code: int = 0, model: str = GPT2) -> str:
    done = laptop.run("submit", "--method", method, "--model", model, *options)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stderr if code else done.stdout


def parameters(laptop: Laptop, given: dict[str, Any]) -> list[str]:
    (laptop.folder / "parameters.json").write_text(json.dumps(given))
    return ["-P", "@parameters.json"]


def assert_equal(ours: toolkit.Result, theirs: toolkit.Result) -> None:
    """All numbers bit for bit, and all words."""
    assert type(ours) is type(theirs)
    one, other = ours._tensors(), theirs._tensors()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert value.numpy().tobytes() == other[name].numpy().tobytes(), name
    assert {**ours._plain(), "record": {}} == {**theirs._plain(), "record": {}}


@pytest.mark.parametrize("method", ASKED)
def test_every_method_gives_what_the_toolkit_gives_here(laptop: Laptop, gpt2: Any, method: str) -> None:
    submit(laptop, method, *parameters(laptop, ASKED[method]), "--out", "found.safetensors")
    found = toolkit.load(laptop.folder / "found.safetensors")
    here = toolkit.run_method(method, gpt2, ASKED[method], progress=False)
    assert_equal(found, here)
    for name in ("method", "parameters", "commit", "dtype", "attention", "versions"):
        assert found.record[name], name
        assert found.record[name] == here.record[name], name


def test_all_of_them_are_tried() -> None:
    assert list(ASKED) == list(METHODS)


def test_the_record_is_enough_to_make_the_result_again(laptop: Laptop, cache: Path) -> None:
    """Which prompts are held out is drawn: another seed gives other numbers, the recorded one the same."""
    options = ["-P", "labels=[0, 1, 0, 1, 0, 1, 0, 1]", "-P", "held_out=0.5"]
    (laptop.folder / "prompts.txt").write_text("\n".join(CITIES * 2) + "\n")
    submit(laptop, "probe", "--prompts-file", "prompts.txt", *options, "-P", "seed=5", "--out", "first.json")
    record = toolkit.load(laptop.folder / "first.json").record
    commit = next((cache / f"models--{GPT2.replace('/', '--')}" / "snapshots").iterdir()).name
    assert record["method"] == "probe"
    assert record["parameters"]["prompts"] == CITIES * 2
    assert record["parameters"]["layers"] is None
    assert (record["model"], record["commit"], record["dtype"], record["seed"]) == (GPT2, commit, "float32", 5)
    assert record["threads"] == 1
    packages = ("edif-hpc", "nnsight", "torch", "transformers")
    assert record["versions"] == {"python": platform.python_version(), **{name: version(name) for name in packages}}
    submit(laptop, "probe", "-P", "@first.json", "--out", "again.json", model=f"{GPT2}@{commit}")
    first, again = (json.loads((laptop.folder / f"{name}.json").read_text()) for name in ("first", "again"))
    assert again["edif_hpc"].pop("record") == {**first["edif_hpc"].pop("record"), "revision": commit}
    assert again == first
    (laptop.folder / "other.json").write_text(json.dumps({**record["parameters"], "seed": 6}))
    submit(laptop, "probe", "-P", "@other.json", "--out", "another.json")
    assert json.loads((laptop.folder / "another.json").read_text())["tensors"] != first["tensors"]


def test_every_form_without_torch_here(laptop: Laptop, gpt2: Any) -> None:
    expected = toolkit.logit_lens(gpt2, CITIES[:2], top=2, tokens=[3])
    asked = ["submit", "--method", "logit_lens", "--model", GPT2, "--prompt", CITIES[0], "--prompt", CITIES[1]]
    for form in ("safetensors", "npz", "json", "pt", "parquet"):
        out = laptop.folder / f"lens.{form}"
        done = laptop.run(*asked, "-P", "top=2", "-P", "tokens=3", "--out", out, without_torch=True)
        assert done.returncode == 0, done.stderr
        assert laptop.shown(done.stdout.strip())["name"] == "logit-lens"
        if form != "parquet":
            assert_equal(toolkit.load(out), expected)
    from pyarrow import parquet

    table = parquet.read_table(laptop.folder / "lens.parquet")
    assert json.loads(table.schema.metadata[b"edif_hpc"])["parameters"]["top"] == 2
    rows = table.to_pylist()
    assert len(rows) == 2 * 4
    assert [(row["prompt"], row["layer"]) for row in rows] == [
        (prompt, layer) for prompt in range(2) for layer in range(4)
    ]
    for row in rows:
        spot = row["prompt"], row["layer"], 0
        assert row["token"] == expected.tokens[row["prompt"]][0]
        assert row["words"] == expected.words[row["prompt"]][row["layer"]][0]
        assert row["ids"] == expected.ids[spot].tolist()
        assert row["probabilities"] == expected.probabilities[spot].tolist()
        assert row[f"probability of {expected.follows[0]!r}"] == expected.followed[spot][0].item()


def test_a_result_that_is_fetched_later(laptop: Laptop, gpt2: Any) -> None:
    done = submit(
        laptop, "steering-vector", "-P", "positive=I love", "-P", "negative=I hate", "--name", "love", "--wait"
    )
    request_id = done.strip()
    assert laptop.shown(request_id)["name"] == "love"
    assert laptop.run("result", request_id).returncode == 0
    found = toolkit.load(laptop.folder / f"{request_id}.pt")
    here = toolkit.steering_vector(gpt2, "I love", "I hate")
    assert_equal(found, here)
    finding = laptop.write(
        """
        import sys
        import edif_hpc
        edif_hpc.connect(progress=False)
        found = edif_hpc.get(sys.argv[1]).result()
        print(sorted(found), found["values"].sum().item())
        """
    )
    assert laptop.python(finding, request_id) == f"['edif_hpc', 'values'] {here.values.sum().item()}\n"


def test_files_stand_for_values(laptop: Laptop, gpt2: Any) -> None:
    (laptop.folder / "clean.txt").write_text("a b c d\r\n\r\na b c f\n")
    (laptop.folder / "corrupt.json").write_text('["a b e d", "a b e f"]')
    files = ["-P", "clean=@clean.txt", "-P", "corrupt=@corrupt.json", "-P", "answer=5", "-P", "wrong=[7, 8]"]
    submit(laptop, "activation-patching", *files, "-P", "component=mlp", "--out", "patched.parquet")
    exact = toolkit.activation_patching(
        gpt2, ["a b c d", "a b c f"], ["a b e d", "a b e f"], answer=5, wrong=[7, 8], component="mlp"
    )
    from pyarrow import parquet

    table = parquet.read_table(laptop.folder / "patched.parquet").to_pydict()
    assert list(table) == ["pair", "layer", "position", "token", "difference", "recovery", "kl"]
    for name, values in (("difference", exact.difference), ("kl", exact.kl), ("recovery", exact.recovery)):
        assert np.array(table[name]).reshape(values.shape).astype(np.float32).tolist() == values.tolist(), name
    assert table["token"][: len(exact.tokens[0])] == exact.tokens[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["logitlens", "--prompt", "a"], "There is no method 'logitlens'; did you mean 'logit-lens'?"),
        (["logit-lens"], "logit-lens needs 'prompts': Texts, or lists of token ids."),
        (["logit-lens", "--prompt", ""], "prompts is [''], which cannot be used"),
        (["logit-lens", "--prompt", "a", "-P", "topp=3"], "logit-lens has no parameter 'topp'; did you mean 'top'?"),
        (["logit-lens", "--prompt", "a", "-P", "top=many"], "top is 'many', which cannot be used; it takes: How many"),
        (["steer", "--prompt", "a", "-P", "positive=b", "-P", "negative=c", "-P", "layers=1", "-P", "factors=NaN"],
         "factors is 'NaN', which cannot be used"),
        (["steering-vector", "-P", "positive=a", "-P", "negative=b", "--prompt", "c"],
         "steering-vector has no parameter 'prompts'; it has positive, negative, "),
        (["activation-patching", "-P", "clean=a", "-P", "corrupt=b", "-P", "wrong=c"], "needs 'answer'"),
        (["probe", "--prompt", "a", "--prompt", "b", "-P", "labels=[1, 1]"], "all labels are 1"),
        (["probe", "--prompt", "a", "-P", "labels=@away.json"], "away.json cannot be read (No such file or directory)"),
        (["logit-lens", "-P", "@broken.json"], "broken.json holds no JSON (Expecting value"),
        (["logit-lens", "-P", "@list.json"], "list.json holds no parameters by name"),
        (["steering-vector", "-P", "@between.json"],
         "between.json was made by SteeringVector.between from several results, so no one method makes it again"),
        (["logit-lens", "--prompts-file", "empty.txt"], "prompts is [], which cannot be used"),
        (["logit-lens", "--prompts-file", "latin.txt"], "latin.txt cannot be read (it is not UTF-8 text)"),
        (["logit-lens", "--prompt", "a", "--out", "lens.csv"],
         "The result of logit-lens is written by the service: take .pt, .safetensors, .npz, .parquet or .json"),
        (["steering-vector", "-P", "positive=a", "-P", "negative=b", "--out", "vector.parquet"],
         "The result of steering-vector is no table: take .pt, .safetensors, .npz or .json (--out or --form)."),
        (["logit-lens", "--prompt", "a", "--pool", "gpus"], "There is no pool 'gpus' here; there are: local."),
        (["logit-lens", "--prompt", "a", "--time", "10:00:00"], "a script may run 120 s here"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value)[:60],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_submitted(laptop: Laptop, options: list[str], sentence: str) -> None:
    for name, content in (
        ("broken.json", b"no"), ("list.json", b"[1]"), ("empty.txt", b"\n"), ("latin.txt", b"\xe9"),
        ("between.json", json.dumps({META: {"record": {"made_by": "SteeringVector.between"}}}).encode()),
    ):  # fmt: skip
        (laptop.folder / name).write_bytes(content)
    before = laptop.run("requests", "list", "--json").stdout
    done = laptop.run("submit", "--model", GPT2, "--method", *options)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert laptop.run("requests", "list", "--json").stdout == before


def test_a_model_that_is_not_there(laptop: Laptop) -> None:
    assert "edif-test/unknown" in submit(laptop, "logit-lens", "--prompt", "a", code=1, model="edif-test/unknown")


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "logit-lens", "--prompt", "a"],
        ["--method", "logit-lens", "--prompt", "a", "--model", GPT2, "--model", "edif-test/llama"],
        ["--method", "logit-lens", "--prompt", "a", "--model", GPT2, "script.py"],
        ["--method", "logit-lens", "--prompt", "a", "--model", GPT2, "-P", "top"],
        ["--method", "logit-lens", "--prompt", "a", "--model", GPT2, "-P", "prompts=b"],
        ["--method", "logit-lens", "--prompt", "a", "--model", GPT2, "-P", "layers=1", "-P", "layers=2"],
        ["--prompt", "a", "--model", GPT2],
        ["script.py", "-P", "top=3", "--model", GPT2],
        [],
    ],
    ids=lambda options: " ".join(options) or "nothing",
)
def test_wrong_usage_is_exit_code_2(laptop: Laptop, options: list[str]) -> None:
    laptop.write("print(1)", "script.py")
    done = laptop.run("submit", *options)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Invalid value for" in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-P", "layers=99"], "There is no layer 99: the model has 4, numbered from 0 to 3.\n"),
        (
            ["-P", "tokens=ab"],
            "'ab' is 2 tokens (['a', 'b']), and one is needed; take another word.\n",
        ),
        (["-P", "tokens=999999"], "There is no token 999999: the model has 512, numbered from 0 to 511.\n"),
    ],
    ids=["layer", "word", "token"],
)
def test_what_only_the_model_shows_is_one_sentence_too(laptop: Laptop, options: list[str], sentence: str) -> None:
    assert submit(laptop, "logit-lens", "--prompt", "a b c", *options, "--wait", code=3) == sentence


@pytest.mark.parametrize("form", ["safetensors", "npz", "pt", "json"])
def test_a_result_that_is_too_large(laptop: Laptop, form: str) -> None:
    """The limit is 32 MiB; neurons of 4 layers, 256 wide, at 10,000 tokens are 40."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 50, (40, 250)).tolist()
    asked = parameters(laptop, {"prompts": prompts, "positions": "all", "component": "neuron"})
    said = submit(laptop, "extract-activations", *asked, "--out", f"large.{form}", code=3)
    assert said == "The result takes more than the limit of 32 MiB: ask for less of it.\n"
    assert not (laptop.folder / f"large.{form}").exists()


def test_how_far_a_long_one_is(laptop: Laptop) -> None:
    """Prompts one by one, far more than can be read between two lines."""
    asked = parameters(laptop, {"prompts": [[5]] * 20_000, "batch_tokens": 1})
    command = laptop.start("submit", "--method", "logit-lens", "--model", GPT2, *asked, "--follow")
    assert command.stdout is not None
    request_id, line = command.stdout.readline().strip(), command.stdout.readline()
    assert re.fullmatch(r"logit_lens: [1-9]\d* of 20000\n", line), line
    assert laptop.run("cancel", request_id).returncode == 0
    command.communicate(timeout=60)
    assert command.returncode == 3


def test_json_is_one_object_a_line(laptop: Laptop) -> None:
    done = submit(laptop, "logit-lens", "--prompt", "a b", "--out", "lens.npz", "--json", "--name", "mine")
    submitted, ended, fetched = map(json.loads, done.splitlines())
    assert submitted == {"id": submitted["id"], "status": "RECEIVED", "models": [GPT2], "name": "mine"}
    assert (ended["id"], ended["status"]) == (submitted["id"], "COMPLETED")
    assert fetched["bytes"] == (laptop.folder / "lens.npz").stat().st_size
