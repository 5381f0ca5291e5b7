"""What methods there are, told where there is neither torch nor a service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edif_hpc.core.methods import METHODS, parse

from .laptop import Laptop

pytestmark = pytest.mark.fast


@pytest.fixture
def alone(tmp_path: Path) -> Laptop:
    return Laptop(tmp_path, "http://127.0.0.1:9", "", tmp_path, "")


def test_the_list_names_every_method_and_parameter(alone: Laptop) -> None:
    done = alone.run("methods", without_torch=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert list(lines) == ["METHOD", *METHODS]
    for name, method in METHODS.items():
        assert method.gives in lines[name]
    assert "clean* corrupt* answer* wrong* component layers positions heads" in lines["attribution-patching"]


def test_one_method_in_detail(alone: Laptop) -> None:
    done = alone.run("methods", "steering_vector")
    assert done.returncode == 0, done.stderr
    title, forms, *rows = done.stdout.splitlines()
    assert title == "steering-vector: A direction a layer between two sets of prompts."
    assert forms == "Forms of its result: pt, safetensors, npz, json"
    words = [row.split()[:2] for row in rows if row.strip()]
    assert ["positive", "needed"] in words
    assert ["normalised", "false"] in words
    assert any("Prompts that show its opposite, or its absence." in row for row in rows)


def test_json_has_the_schema(alone: Laptop) -> None:
    listed = json.loads(alone.run("methods", "--json").stdout)
    assert [each["name"] for each in listed] == list(METHODS)
    one = json.loads(alone.run("methods", "logit-lens", "--json").stdout)
    assert one in listed
    assert one["schema"]["properties"]["top"]["maximum"] == 1000
    given = {each["name"]: each.get("default") for each in one["parameters"] if not each["needed"]}
    assert parse("logit-lens", {"prompts": ["a"], **given}) == parse("logit-lens", {"prompts": ["a"]})


def test_one_that_is_not_there(alone: Laptop) -> None:
    done = alone.run("methods", "logit")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "There is no method 'logit'; did you mean 'logit-lens'?\n"


def test_the_examples_in_the_help_are_right(alone: Laptop) -> None:
    """Each but for the service, which is not there: so it is as far as one can come."""
    import shlex

    from edif_hpc.cli.submit import SUBMIT_HELP

    for name in ("prompts", "labels", "clean", "corrupt", "love", "hate"):
        (alone.folder / f"{name}.txt").write_text("one\ntwo\n")
    text = SUBMIT_HELP.partition("Examples:")[2].replace("\n  -P", " -P")
    lines = [line for line in map(str.strip, text.splitlines()) if "--method" in line]
    assert len(lines) == 4
    for line in lines:
        done = alone.run(*shlex.split(line)[1:])
        assert done.returncode == 4, (line, done.stderr)
        assert "does not answer" in done.stderr
