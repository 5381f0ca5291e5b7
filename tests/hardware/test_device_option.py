"""Tests that are told to run on a GPU refuse where there is none: nothing then counts as having run on one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.models import REPO


def test_without_a_gpu_tests_for_one_are_refused_in_a_sentence() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "--device=cuda", "tests"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "finds no CUDA or ROCm device here: run them on a machine with a GPU" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "passed" not in done.stdout
