"""A service whose servers are reached at a second, real address of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edif_hpc.core.endpoints import store_endpoint
from edif_hpc.core.store import Store
from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import Stack, running

from .reaching import of, tries

SPARE = "198.18.77.1"
"""Added where the machine has only its loopback; from the range set aside for tests, and no loopback's address."""
SETTINGS = """
[network]
address = "{address}"
[worker]
threads = 1
idle_seconds = 3600
[limits]
inline_bytes = 0
"""
# With inline_bytes 0 every payload and every result goes through the store.


def own_addresses() -> list[str]:
    return [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """An address of this machine that is no loopback."""
    if found := own_addresses():
        yield found[0]
        return
    if os.geteuid():
        pytest.skip("this machine has only its loopback, and adding an address needs root")
    done = subprocess.run(["ip", "address", "add", f"{SPARE}/32", "dev", "lo"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine has only its loopback, and no address can be added: {done.stderr.strip()}")
    try:
        yield SPARE
    finally:
        subprocess.run(["ip", "address", "delete", f"{SPARE}/32", "dev", "lo"], check=True)


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_cache(tmp_path_factory.mktemp("hf"), ["gpt2"])


@pytest.fixture(scope="package")
def reached(address: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A service with a tiny model, reached at `address`."""
    home = tmp_path_factory.mktemp("network") / "home"
    with running(home, cache, "process", SETTINGS.format(address=address)) as found:
        eventually(lambda: tries(lambda: Store(of(found, store_endpoint)).ensure_bucket()), 60, "the store")
        yield found
