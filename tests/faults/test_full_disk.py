"""The file system under the home is full for twenty seconds: Redis, the store, logs and scratch write to it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

from tests.delivery.scene import PATIENCE, soon
from tests.stock import support
from tests.support.stack import client_of

from .conftest import gate_of
from .flight import Block, Flight, Sent, packed
from .scene import service

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")]

DISK_BYTES = 256 * 1024 * 1024
FULL_SECONDS = 20.0
CHUNK = b"\0" * 65536


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, and a small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0755", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte is left on it."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(CHUNK)
                except OSError:
                    break
        yield
    finally:
        filler.unlink()


def test_a_full_disk(disk: Path, cache: Path, logits: torch.Tensor) -> None:
    """No space left for 20 s with 40 requests in flight"""
    with service(disk / "home", cache) as stack, client_of(stack):
        model = support.tiny()
        blocks = packed(model, gate_of(stack), logits)
        flight = Flight(stack, blocks, gate_of(stack))
        flight.when("RUNNING")
        flight.gate.touch()
        with full(disk):
            soon(stack, lambda: refused(flight, blocks[-1]), PATIENCE, "a refusal")
            time.sleep(FULL_SECONDS)
        flight.land(2 * PATIENCE)
        support.works(model)


def refused(flight: Flight, block: Block) -> bool:
    """Whether the service takes nothing more; what it does take belongs to the flight."""
    client = block.backend(blocking=False)
    try:
        client.submit(None)
    except RemoteError as error:
        if "takes no requests at the moment" not in str(error):
            raise
        return True
    flight.sent.append(Sent(block, client))
    return False
