"""What a script or its author does wrong: their own traceback, or one sentence and an exit code that tells which."""

from __future__ import annotations

import json

import pytest

from tests.support.servers import free_port

from .laptop import Laptop

OWN_MISTAKES = ("A script that runs next to its models asks no service",)
"""Of a kind that happens at home too, so that a traceback shows where."""
MODEL = """
import os, sys, time
import edif_hpc
from nnsight import TransformersModel
model = TransformersModel("edif-test/gpt2", task="text-generation")
"""


def test_an_exception_comes_back_as_the_scripts_own_traceback(laptop: Laptop) -> None:
    script = f"""{MODEL}
def inner(layer):
    with model.trace("a b c", remote=True):
        hidden = model.transformer.h[layer].output[0].save()
        1 / 0
    return hidden

print("before")
inner(1)
"""
    done = laptop.run("submit", laptop.write(script), "--follow")
    assert done.returncode == 3
    assert done.stdout.splitlines()[1:] == ["before"]
    lines = done.stderr[done.stderr.index("Traceback") :].splitlines()
    assert lines[-1] == "ZeroDivisionError: division by zero"
    files = [line for line in lines if line.strip().startswith("File ")]
    assert files
    assert all(line.strip().startswith('File "experiment.py"') for line in files)
    assert [line.strip() for line in lines if line.strip() in ("inner(1)", "1 / 0")] == ["inner(1)", "1 / 0"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("sys.exit(7)", "The script ended with exit code 7."),
        ("sys.exit('no such layer')", "The script ended with: no such layer"),
        ("TransformersModel('edif-test/llama', task='text-generation')", "name it with --model when you submit"),
        ("TransformersModel('edif-test/gpt2', task='fill-mask')", "The script builds 'edif-test/gpt2' for fill-mask"),
        ("edif_hpc.save('who', object())", "The value 'who'"),
        ("edif_hpc.save('a', 1); open(os.environ['EDIF_HPC_OUTPUT'], 'w').write('b')", "a result is one of the two"),
        ("open(os.environ['EDIF_HPC_OUTPUT'], 'w').write('b'); edif_hpc.save('a', 1)", "a result is one of the two"),
        ("edif_hpc.requests()", "A script that runs next to its models asks no service"),
    ],
    ids=["exit code", "exit text", "undeclared", "task", "unsavable", "both", "both turned", "service"],
)
def test_what_a_script_may_not_or_cannot(laptop: Laptop, body: str, sentence: str) -> None:
    done = laptop.run("submit", laptop.write(MODEL + body), "--wait", "--form", "npz", "--model", "edif-test/gpt2")
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert sentence in done.stderr
    assert ("Traceback" in done.stderr) == (sentence in OWN_MISTAKES)


@pytest.mark.parametrize(
    "body",
    [
        "import numpy; numpy.savez(os.environ['EDIF_HPC_OUTPUT'], a=numpy.ones(3))",
        "import torch; from safetensors.torch import save_file; "
        "save_file({'a': torch.ones(3)}, os.environ['EDIF_HPC_OUTPUT'])",
        "(__import__('pathlib').Path(os.environ['EDIF_HPC_OUTPUT']) / 'part').mkdir()",
    ],
    ids=["numpy", "safetensors", "folder"],
)
def test_who_takes_the_output_for_a_folder_is_told_how_to_write_to_it(laptop: Laptop, body: str) -> None:
    done = laptop.run("submit", laptop.write(MODEL + body), "--wait")
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "Traceback" in done.stderr
    assert "EDIF_HPC_OUTPUT is one file without a folder: open it" in done.stderr.rstrip().splitlines()[-1]


def test_a_file_that_is_too_large(laptop: Laptop) -> None:
    body = "open(os.environ['EDIF_HPC_OUTPUT'], 'wb').write(bytes(40 * 2**20))"
    done = laptop.run("submit", laptop.write(MODEL + body), "--wait")
    assert done.returncode == 3
    if laptop.level == "none":  # nothing limits the process itself, so it is noticed at the end
        assert done.stderr == "The script's file is larger than the limit of 32 MiB: write less.\n"
    else:
        assert done.stderr.rstrip().endswith("OSError: [Errno 27] File too large")


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("print(1)", [], "builds no model that can be seen"),
        ("import sys\nfrom nnsight import *\nLanguageModel(sys.argv[1])", [], "builds in line 3 is only known when"),
        ("x = (", [], "is no Python in line 1"),
        (MODEL, ["--model", "edif-test/unknown"], "edif-test/unknown"),
        (MODEL, ["--model", "../../etc"], "which cannot name one on the Hub"),
        (MODEL, ["--model", "edif-test/gpt2-lora"], "is a PEFT adapter, not a model"),
        (MODEL, ["--pool", "gpus"], "There is no pool 'gpus' here; there are: local."),
        (MODEL, ["--time", "10:00:00"], "a script may run 120 s here"),
        (MODEL, ["--name", "a\x07b"], "wrong at name"),
    ],
    ids=["no model", "unknown name", "syntax", "not there", "no name", "adapter", "pool", "time", "bell"],
)
def test_what_is_refused_at_submission_leaves_nothing_behind(
    laptop: Laptop, source: str, options: list[str], sentence: str
) -> None:
    before = laptop.run("requests", "list", "--json").stdout
    done = laptop.run("submit", laptop.write(source), *options)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert laptop.run("requests", "list", "--json").stdout == before


@pytest.mark.parametrize(
    "options", [["--time", "soon"], ["--form", "csv"], ["--out", "a.npz", "--form", "pt"], ["--model"]]
)
def test_wrong_usage_is_exit_code_2(laptop: Laptop, options: list[str]) -> None:
    assert laptop.run("submit", laptop.write(MODEL), *options).returncode == 2


def test_a_place_that_takes_no_file_is_refused_before_anything_runs(laptop: Laptop) -> None:
    (laptop.folder / "a.json").mkdir()
    before = laptop.run("requests", "list", "--json").stdout
    for out, why in (("nowhere/x.json", "is no folder"), ("a.json", "a.json is a folder; give --out the name")):
        done = laptop.run("submit", laptop.write(MODEL), "--out", out)
        assert done.returncode == 1
        assert done.stdout == ""
        assert why in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert laptop.run("requests", "list", "--json").stdout == before


def test_a_file_that_is_not_there(laptop: Laptop) -> None:
    done = laptop.run("submit", laptop.folder / "nowhere.py")
    assert done.returncode == 1
    assert "cannot be read (No such file or directory)" in done.stderr


def test_a_service_that_is_down_says_so_and_what_to_do(laptop: Laptop) -> None:
    laptop.url = f"http://127.0.0.1:{free_port()}"
    done = laptop.run("submit", laptop.write(MODEL), "--wait")
    assert done.returncode == 4
    assert done.stdout == ""
    assert f"The gateway at {laptop.url} does not answer" in done.stderr
    assert "`edif-hpc up`" in done.stderr
    for command in (["requests", "list"], ["status", "a" * 32], ["result", "a" * 32], ["cancel", "a" * 32]):
        assert laptop.run(*command).returncode == 4, command
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_wrong_key_is_refused(laptop: Laptop) -> None:
    laptop.key = "edif_wrong"
    done = laptop.run("submit", laptop.write(MODEL))
    assert done.returncode == 1
    assert "key" in done.stderr


def test_json_is_one_object_a_line(laptop: Laptop) -> None:
    script = laptop.write(MODEL + "print('a line'); edif_hpc.save('n', 1)")
    done = laptop.run("submit", script, "--follow", "--json", "--name", "my run", "--out", "n.json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {
        "id": lines[0]["id"], "status": "RECEIVED", "models": ["edif-test/gpt2"], "name": "my run"
    }  # fmt: skip
    statuses = [line["status"] for line in lines[1:-1]]
    assert statuses[-1] == "COMPLETED"
    assert "RUNNING" in statuses
    assert [line["description"] for line in lines[1:-1] if line["status"] == "LOG"] == ["a line"]
    assert lines[-1] == {"id": lines[0]["id"], "file": str(laptop.folder / "n.json"), "bytes": lines[-1]["bytes"]}
    assert json.loads((laptop.folder / "n.json").read_text()) == {"n": 1}
