"""Pages that a rehearsal touched are there in a later fork before it needs them."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from edif_hpc.worker import prefault

pytestmark = pytest.mark.fast

PAGES = 2000
PAGE = os.sysconf("SC_PAGE_SIZE")


def faults_of(action: Callable[[], object], spans: tuple[prefault.Span, ...]) -> int:
    """Minor faults that `action` takes in a fork that brought `spans`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        prefault.bring(spans)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        action()
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return int(said)


def write_all(memory: mmap.mmap) -> None:
    for at in range(0, PAGES * PAGE, PAGE):
        memory[at] = 1


def test_written_pages_are_copied_ahead() -> None:
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE)
    write_all(memory)
    spans = prefault.learn(lambda: write_all(memory))
    assert faults_of(lambda: write_all(memory), ()) > PAGES * 0.9
    assert faults_of(lambda: write_all(memory), spans) < PAGES * 0.1


def test_read_pages_of_a_file_are_mapped_ahead(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(PAGES * PAGE))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def read_all() -> int:
        return sum(memory[at] for at in range(0, PAGES * PAGE, PAGE))

    alone = faults_of(read_all, ())
    assert faults_of(read_all, prefault.learn(read_all)) < alone / 2
    assert memory[: PAGES * PAGE] == path.read_bytes()


def test_what_a_fork_brings_it_does_not_share() -> None:
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE)
    memory[0] = 7

    def overwrite() -> None:
        memory[0] = 9

    spans = prefault.learn(overwrite)
    assert spans
    faults_of(overwrite, spans)
    assert memory[0] == 7


def test_a_rehearsal_that_fails_teaches_nothing() -> None:
    def fail() -> None:
        raise RuntimeError("on purpose")

    assert prefault.learn(fail) == ()
    assert prefault.learn(lambda: os.kill(os.getpid(), 9)) == ()


def test_pages_that_are_gone_are_passed_over() -> None:
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE)
    spans = prefault.learn(lambda: write_all(memory))
    memory.close()
    prefault.bring(spans)
