"""The examples of the methods, each as a user runs it, on the real model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import models
from tests.support.stack import Stack

FOLDER = models.REPO / "examples" / "methods"
SAID = {
    "activation_patching": "layer 23 brings back 0% at the subject, 79% at the last token",
    "attention_patterns": "induction: layer 18, head 6: 0.9",
    "attribution_patching": "layer 29, head 1: guessed ",
    "extract_activations": "Activations(values=float32[8, 3, 1, 576]",
    "logit_lens": "layer 29: ' Paris' 65%",
    "probe": "layer 27: 100% right on the template that it never saw",
    "steering": "+2  good less bad +",
    "top_neurons": "layer 29: [",
}


def test_there_is_one_for_each() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == SAID.keys()


@pytest.mark.parametrize("name", SAID)
def test_it_runs(name: str, service: Stack, cache: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "NDIF_HOST": service.url,
        "NDIF_API_KEY": service.key,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(cache),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONWARNINGS": "error",
    }
    script = [sys.executable, str(FOLDER / f"{name}.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAID[name] in done.stdout
    assert list(tmp_path.glob("*.html"))
