"""Ports of the embedded servers: free ones, chosen once and kept in the home; chosen again when somebody took one."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from edif_hpc.core.endpoints import PORTS, embedded_ports
from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings

from .network import LOOPBACK, listened
from .process import living

NAMES = {
    "redis": ("redis",),
    "store": (
        "store", "store_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc",
    ),
}  # fmt: skip
"""The ports each embedded server opens. SeaweedFS would open a gRPC port 10000 above each HTTP port if not told."""
RANGE = (20_000, 32_000)
"""Below the kernel's ephemeral ports, so that no outgoing connection takes one while a server is down."""


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether we could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


def are_free(port: int, hosts: Iterable[str]) -> bool:
    """Whether an embedded server could: what SeaweedFS left there, run by another user, is not ours to replace."""
    return all(is_free(port, host) for host in hosts) and all(_is_ours(path) for path in sockets(port))


def sockets(port: int) -> Iterable[Path]:
    """What SeaweedFS puts into /tmp for a gRPC port, wherever it is told to keep its files."""
    return Path("/tmp").glob(f"seaweedfs-*-{port}.sock")  # noqa: S108 - SeaweedFS's own choice


def remove_sockets(known: Mapping[str, int]) -> None:
    """Remove the sockets that a SeaweedFS with these ports left: one that is killed does not."""
    for name in NAMES["store"]:
        for path in sockets(known[name]) if name in known else ():
            if _is_ours(path):
                path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return True


def choose(home: Home, settings: Settings, server: str) -> dict[str, int]:
    """The ports of one embedded server that is about to start, all free now; kept in the home.

    Raises:
        ComponentError: a port that the settings name is taken.
    """
    fixed = {"redis": settings.redis.port, "store": settings.store.port}[server]
    known = embedded_ports(home)
    others = {port for name, port in known.items() if name not in NAMES[server]}
    chosen: dict[str, int] = {}
    everywhere, own = listened(settings), hosts_of(home, settings, server)
    for name in NAMES[server]:
        wanted = fixed if name == server else 0
        if wanted and not are_free(wanted, own):
            raise taken(server, wanted)
        port = wanted or known.get(name, 0)
        if not port or port in others or not are_free(port, own):
            port = _any_free(others, everywhere)
        chosen[name] = port
        others.add(port)
    if chosen != {name: known.get(name) for name in chosen}:
        home.write_private(home.run / PORTS, json.dumps({**known, **chosen}))
    return chosen


def hosts_of(home: Home, settings: Settings, server: str) -> tuple[str, ...]:
    """Where a server's port must be free. Redis's at the address is the relay's, which outlives it: a Redis that comes
    back on another port would strand every worker."""
    return (LOOPBACK,) if server == "redis" and living(home, "relay") else listened(settings)


def reserve(home: Home, settings: Settings) -> None:
    """Choose ports for embedded servers that have none yet, so that whoever uses them can start before they do."""
    for server, external in {"redis": settings.redis.url, "store": settings.store.endpoint}.items():
        if not external and server not in embedded_ports(home):
            choose(home, settings, server)


def taken(server: str, port: int) -> ComponentError:
    return ComponentError(f"Port {port} is taken; set {server}.port to another, or to 0 for any free one.")


def _any_free(others: set[int], hosts: tuple[str, ...]) -> int:
    for port in random.sample(range(*RANGE), 200):
        if port not in others and are_free(port, hosts):
            return port
    raise ComponentError(f"No free port was found between {RANGE[0]} and {RANGE[1]} on {' and '.join(hosts)}.")
