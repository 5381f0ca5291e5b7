"""The package's face: everything public, and nothing heavy before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edif_hpc
from edif_hpc import client
from edif_hpc.client._progress import Progress, Silent, as_html, reading, screen
from edif_hpc.core.errors import EdifError

pytestmark = pytest.mark.fast


def test_importing_costs_nothing_and_using_it_no_torch() -> None:
    script = """
import sys
import edif_hpc
HEAVY = {"nnsight", "torch", "huggingface_hub", "redis", "pydantic"}
assert not (HEAVY | {"edif_hpc.client", "httpx"}) & set(sys.modules)
edif_hpc.connect, edif_hpc.submit, edif_hpc.get, edif_hpc.batch, edif_hpc.dry_run, edif_hpc.SurpriseWarning
assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
try:
    edif_hpc.requests()
except edif_hpc.NotConnected as error:
    assert "edif_hpc.connect(url, key)" in str(error), error
assert not {"nnsight", "torch"} & set(sys.modules)
"""
    environment = {"PATH": "", "EDIF_HPC_HOME": "/nonexistent", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_type_checkers_are_told_the_same_names() -> None:
    stub = ast.parse(Path(edif_hpc.__file__).with_suffix(".pyi").read_text())
    named = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named == set(client.__all__) == edif_hpc.CLIENT
    assert set(dir(edif_hpc)) > named
    for name in client.__all__:
        assert getattr(edif_hpc, name) is getattr(client, name)


def test_the_errors_are_one_documented_tree() -> None:
    from edif_hpc.client import _errors

    for name in client.__all__:
        kind = getattr(client, name)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, Warning):
            assert issubclass(kind, EdifError)
            assert f"── {name} " in (_errors.__doc__ or ""), name


def test_the_line_of_a_download() -> None:
    assert reading(1_000_000, 0, 0, 0.1) == "╌" * 20 + " 0% of 1.0 MB"
    assert reading(10_000_000, 4_000_000, 1_000_000, 2.0).endswith(" 50% of 10.0 MB, 500.0 kB/s, 10.0 s left")
    assert as_html("<b>", "dim") == '<pre style="margin:0;opacity:0.7;">&lt;b&gt;</pre>'


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(screen(None), "3fa85f64").shown() as progress:
        progress.download(10)
    assert isinstance(screen(False), Silent)
    assert capsys.readouterr() == ("", "")
    with Progress(screen(True), "3fa85f64").shown():
        pass
    assert capsys.readouterr().err.startswith("3fa85f64 WAITING after ")
