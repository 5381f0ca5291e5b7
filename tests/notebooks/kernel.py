"""Notebooks run as a person would run them, against a service: cells in order, in a kernel and a folder of their own.

What is shared by the tests, which check what a kernel holds in the end, and by `write`, which keeps what it drew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from edif_hpc.fleet import library
from edif_hpc.fleet.demo_model import REPO_ID
from tests.support import models
from tests.support.stack import Stack, running

FOLDER = models.REPO / "examples" / "notebooks"
NAMES = ("getting_started", "gender_bias", "steering_study", "activation_patching", "comparing_models")
ROUNDED = "local/smollm2-4-bits"
"""What comparing_models takes beside the real model; its own first cell says how it is made."""
SETTINGS = f"""
[models.dtype]
"{REPO_ID}" = "float32"
"{ROUNDED}" = "float32"
[worker]
threads = 1
idle_seconds = 3600
"""
CELL_SECONDS = 240
PROGRESS = '<pre style="margin:0;'
"""How a progress line of the client begins in a notebook: it names a request and a time, new ones in each run."""


@contextmanager
def service(folder: Path) -> Iterator[tuple[Stack, Path]]:
    """A service with both models, and its cache."""
    hub = models.smollm2(folder / "hf")
    _rounded(folder, hub)
    with running(folder / "home", hub, "locked", SETTINGS) as stack:
        yield stack, hub


def _rounded(folder: Path, hub: Path) -> None:
    made = folder / ROUNDED.partition("/")[2]
    script = [sys.executable, str(FOLDER / "rounded.py"), REPO_ID, str(made), "--bits", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "PYTHONWARNINGS": "error"}
    subprocess.run(script, check=True, capture_output=True, env=environment)
    library.pull(str(made), hub)
    shutil.rmtree(made)


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(name: str, stack: Stack, hub: Path, folder: Path, *, before: str, after: str = "") -> Any:
    """A notebook with the outputs of this run, in a copy of the examples that lies in `folder`.

    Args:
        before, after: cells around the notebook's own; they are not in what comes back.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    examples = folder / "examples"
    shutil.copytree(models.REPO / "examples", examples, dirs_exist_ok=True)
    notebook = read(name)
    around = [nbformat.v4.new_code_cell(each) for each in (before, after)]
    notebook.cells = [around[0], *notebook.cells, around[1]]
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": examples / "notebooks"}}
    )
    client.execute(env=_environment(stack, hub, folder))
    notebook.cells = notebook.cells[1:-1]
    return notebook


def _environment(stack: Stack, hub: Path, folder: Path) -> dict[str, str]:
    """A researcher's own, with nothing of who runs this."""
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "EDIF_HPC_HOME": str(folder / "no-home"),
        "NDIF_HOST": stack.url,
        "NDIF_API_KEY": stack.key,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_progress(output: Any) -> bool:
    return output.output_type == "display_data" and str(output.data.get("text/html", "")).startswith(PROGRESS)


def is_picture(output: Any, kind: str) -> bool:
    return kind in output.get("data", {})
