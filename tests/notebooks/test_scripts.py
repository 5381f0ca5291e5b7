"""The examples of `edif-hpc submit`, on the real model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from pyarrow import parquet

from edif_hpc.fleet.demo_model import REPO_ID
from tests.submit.laptop import Laptop
from tests.support import models
from tests.support.stack import Stack

FOLDER = models.REPO / "examples" / "submit"


@pytest.fixture
def laptop(served: tuple[Stack, Path], tmp_path: Path) -> Laptop:
    stack, hub = served
    return Laptop(tmp_path, stack.url, stack.key, hub, "locked")


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"answers", "compare"}


def test_answers(laptop: Laptop) -> None:
    said = good(laptop.run("submit", FOLDER / "answers.py", "--follow", "--out", "answers.parquet", "--", "--top", "3"))
    assert said.splitlines()[1:] == [
        "4 of 5: The capital of {} is",
        "5 of 5: The capital city of {} is called",
        "2 of 5: In {} the government sits in",
    ]
    table = parquet.read_table(laptop.folder / "answers.parquet").to_pydict()
    assert table["country"][4] == "Japan"
    assert table["probability"][4] == pytest.approx(0.700, abs=2e-3)
    assert sum(table["right"]) == 11


def test_compare(laptop: Laptop) -> None:
    """With itself a model agrees; what it has with another is in comparing_models, which submits this script."""
    good(laptop.run("submit", FOLDER / "compare.py", "--model", REPO_ID, "--out", "same.json", "--", REPO_ID, REPO_ID))
    same = json.loads((laptop.folder / "same.json").read_text())
    assert same["probability"][0] == pytest.approx([0.654, 0.654], abs=2e-3)
    assert max(map(max, same["error"])) == 0
    assert max(map(max, same["lens_kl"])) < 1e-5
    assert same["nats_a_token"] == pytest.approx([3.194, 3.194], abs=0.01)
