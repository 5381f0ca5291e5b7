"""`make notebooks`: run the examples' notebooks against a service of their own, and keep what they say and draw.

    python -m tests.notebooks.write [NAME …]

Pictures become PNG, so that they are seen where a notebook is only looked at. What is new in each run (times, requests'
ids, progress lines) is left out, so that an unchanged notebook stays unchanged but for what the numbers change.
"""

from __future__ import annotations

import re
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
FAR = re.compile(r"^\w+: \d+ of \d+\n", re.MULTILINE)
"""A line of the toolkit's, every ten seconds of a long method."""
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
        cell.outputs = _joined([output for output in cell.outputs if not kernel.is_progress(output)])
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """What was printed in one piece, however it came, without the lines that say how far a long method is."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream" and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            output.text = FAR.sub("", output.text)
    return [output for output in found if output.output_type != "stream" or output.text]


if __name__ == "__main__":
    main(sys.argv[1:])
