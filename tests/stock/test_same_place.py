"""The same file and line again, with another source: nnsight remembers blocks by place, and a service must not.

Notebooks do this all day (a cell that is edited and run again), and so do two users whose scripts have equal names.
"""

from __future__ import annotations

import linecache
from typing import Any

import pytest
from nnsight.intervention.backends.remote import RemoteError
from nnsight.tracing import globals as nnsight_globals

from tests.support.stack import Stack

from .support import PROMPT, key_of

CELL = """
with model.trace(PROMPT, remote=remote, backend=backend):
    answer = (model.lm_head.output[0, -1].sum() * 0 + {number}).save()
"""


def run_cell(source: str, filename: str, **names: Any) -> dict[str, Any]:
    """Run a cell as a notebook does; a new process has never seen its name."""
    for memory in (nnsight_globals.SOURCES, nnsight_globals.BLOCKS):
        memory.clear()
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"PROMPT": PROMPT, "remote": True, "backend": None, **names}
    try:
        exec(compile(source, filename, "exec"), namespace)
    finally:
        linecache.cache.pop(filename, None)
    return namespace


@pytest.mark.parametrize("filename", ["<ipython-input-1>", "/tmp/ipykernel_12/34.py", "experiment.py"])
def test_a_cell_that_was_edited(stack: Stack, gpt2: Any, filename: str) -> None:
    answers = [float(run_cell(CELL.format(number=n), filename, model=gpt2)["answer"]) for n in (1, 2, 3)]
    assert answers == [1, 2, 3]


def test_a_cell_that_failed_and_was_mended(stack: Stack, gpt2: Any) -> None:
    with pytest.raises(RemoteError, match="no_such_name"):
        run_cell(CELL.format(number="no_such_name"), "<cell>", model=gpt2)
    assert float(run_cell(CELL.format(number=4), "<cell>", model=gpt2)["answer"]) == 4


def test_the_block_moved_within_its_file(stack: Stack, gpt2: Any) -> None:
    for n in range(3):
        source = "\n" * n + CELL.format(number=n) + "\n" * (5 - n)
        assert float(run_cell(source, "moved.py", model=gpt2)["answer"]) == n


def test_two_users_with_equal_file_names(stack: Stack, gpt2: Any) -> None:
    from .support import backend

    for turn in range(2):
        for number, key in enumerate((stack.key, key_of(stack, "second"))):
            chosen = backend(gpt2, api_key=key)
            names = run_cell(CELL.format(number=10 * turn + number), "experiment.py", model=gpt2, backend=chosen)
            assert float(names["answer"]) == 10 * turn + number


def test_several_blocks_of_one_file(stack: Stack, gpt2: Any) -> None:
    source = "".join(CELL.format(number=n).replace("answer", f"answer_{n}") for n in range(3))
    for _ in range(2):
        names = run_cell(source, "several.py", model=gpt2)
        assert [float(names[f"answer_{n}"]) for n in range(3)] == [0, 1, 2]
