"""Scripts as their authors run them, in a process of their own: nothing of the tests is there to help.

Local modules beside a script, the two variables a researcher sets, and the download of a large result in asyncio.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.stack import Stack

HELPERS = '''
"""A local module, with a class, a constant and a function that uses another one."""
import math
import torch

SCALE = 3.0


class Probe:
    def __init__(self, width):
        self.weights = torch.ones(width)

    def __call__(self, hidden):
        return hidden.float() @ self.weights


def _root(value):
    return math.sqrt(value)


def scaled(value):
    return value * SCALE / _root(9.0)


def fails(value):
    raise LookupError("inside a local module")
'''

SCRIPT = """
import asyncio, json, sys
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteError
from nnsight.modeling.huggingface import _ID_CACHE
from nnsight.modeling.transformers import TransformersModel
import helpers
from lab.tools import twice

name = sys.argv[1]
_ID_CACHE[name] = name
model = TransformersModel(name, task="text-generation")
probe = helpers.Probe(64)
with model.trace("The Eiffel Tower", remote=True):
    hidden = model.transformer.h[0].output
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    probed = probe(hidden).save()
    plain = hidden.float().sum(-1).save()
    scaled = helpers.scaled(5.0).save()
    doubled = twice(21).save()
try:
    with model.trace("The Eiffel Tower", remote=True):
        helpers.fails(1)
except RemoteError as error:
    failure = str(error)


def asked():
    backend = AsyncRemoteBackend(model.to_model_key(), env=model._remoteable_get_env())
    with model.trace("The Eiffel Tower", backend=backend):
        import torch
        found = torch.rand(700_000).save()
    return backend


async def large():
    awaited = await asked()
    iterated = [update async for update in asked()][-1]
    return [len(awaited["found"]), len(iterated["found"])]


answer = {
    "same": bool((probed - plain).abs().max() < 1e-4), "scaled": scaled, "doubled": doubled, "failure": failure,
    "large": asyncio.run(large()) if "large" in sys.argv else None,
}
open("answer.json", "w").write(json.dumps(answer))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("")
    (tmp_path / "lab" / "tools.py").write_text("def twice(value):\n    return 2 * value\n")
    return tmp_path


def run(stack: Stack, cache: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    environment = {
        "NDIF_HOST": stack.url, "NDIF_API_KEY": stack.key, "HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "script.py", models.repo_id("gpt2"), *arguments],
        env=stack.environment(**environment), cwd=folder, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "answer.json").read_text())


def test_local_modules_travel_with_a_script(stack: Stack, cache: Path, folder: Path) -> None:
    found = run(stack, cache, folder)
    assert found["same"]
    assert found["scaled"] == 5.0
    assert found["doubled"] == 42
    assert "LookupError: inside a local module" in found["failure"]
    assert "in fails" in found["failure"]
    assert "site-packages/nnsight" not in found["failure"]


def test_a_large_result_is_awaited_and_iterated_for(stack: Stack, cache: Path, folder: Path) -> None:
    """By a link, which the stock client downloads with an asyncio library that must get on with nnsight."""
    assert run(stack, cache, folder, "large")["large"] == [700_000, 700_000]
