"""`make notebooks`: run the examples' notebooks against a service of their own, and keep what they say and draw.

    python -m tests.notebooks.write [NAME …]

Pictures become PNG, so that they are seen where a notebook is only looked at. What is new in each run (times, requests'
ids, progress lines) is left out, so that an unchanged notebook stays unchanged but for what the numbers change.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from . import kernel

SCALE = 1.5
BEFORE = f"""
import plotly.io
plotly.io.renderers["png"].scale = {SCALE}
plotly.io.renderers.default = "png"
"""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place, kernel.service(Path(place)) as (stack, hub):
        for name in names or kernel.NAMES:
            folder = Path(place) / "researcher" / name
            notebook = kernel.executed(name, stack, hub, folder, before=BEFORE)
            target = kernel.FOLDER / f"{name}.ipynb"
            nbformat.write(cleaned(notebook), target)
            print(f"{target.name}: {target.stat().st_size // 1000} kB", flush=True)


def cleaned(notebook: Any) -> Any:
    """The same, with nothing in it that another run would have otherwise."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({})
    for number, cell in enumerate(kernel.code_cells(notebook), 1):
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if not kernel.is_progress(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
