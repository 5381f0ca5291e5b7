"""What a block prints, as lines: what a terminal would show of it, and no more than is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edif_hpc.worker import prints
from edif_hpc.worker.prints import LineWriter

pytestmark = pytest.mark.fast


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    def write(*texts: str, every: float = 1e9) -> list[str]:
        monkeypatch.setattr(prints, "REWRITTEN_SECONDS", every)
        found: list[str] = []
        writer = LineWriter(found.append, 4, 100)
        for text in texts:
            writer.write(text)
        writer.finish()
        return found

    return write


def test_whole_lines_and_the_rest_at_the_end(written: Callable[..., list[str]]) -> None:
    assert written("a", "b\nc\n", "\n", "d") == ["ab", "c", "", "d"]
    assert written("a\r\n", "b\r") == ["a", "b"]
    lines = written(*("x\n" for _ in range(9)))
    assert lines[:4] == ["x"] * 4
    assert len(lines) == 5
    assert "further lines were dropped" in lines[4]


def test_a_progress_bar_is_its_last_state_and_a_look_now_and_then(written: Callable[..., list[str]]) -> None:
    bar = [f"\r{done}%" for done in range(0, 101, 50)]
    assert written(*bar, "\n", "done\n") == ["100%", "done"]
    assert written("".join(bar) + "\n") == ["100%"]
    assert written(*(f"{done}%\r" for done in range(0, 101, 50))) == ["100%"]
    assert written(*bar, "\n", every=0.0) == ["0%", "50%", "100%"]
    endless = LineWriter(lambda line: None, 4, 100)
    for _ in range(1000):
        endless.write("\rx" * 100)
    assert len(endless._partial) < 1000
