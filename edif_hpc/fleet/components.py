"""The components of one home: how each is started, what it waits for, how it ends."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from edif_hpc.core.endpoints import REDIS_PASSWORDS, Role, embedded_ports, in_url
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings

from . import embedded
from .network import LOOPBACK
from .state import gateway_url

ANSWER_SECONDS = 0.5
HTTP_OK = 200

STOP_SECONDS = {"fleet": 10.0, "worker": 45.0, "gateway": 10.0, "store": 2.0, "relay": 5.0, "redis": 30.0}
"""How long each may take to end before it is killed. SeaweedFS sits out 15 s of its own; what it acknowledged is in its
files by then, so it is not waited for."""


@dataclass(frozen=True)
class Component:
    """One process to keep running.

    Args:
        command: writes what the process reads, and returns its argument list. Called at every start.
        address: where it will listen; called after `command`.
        answers: whether those who need it can start.
        needs: components that must answer first.
        after: components that get a head start when everything is started at once: the gateway answers sooner.
        follows: components whose address it learns at its start: it is restarted when theirs changes.
    """

    name: str
    command: Callable[[], list[str]]
    address: Callable[[], str] = lambda: ""
    answers: Callable[[], bool] = lambda: True
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    folder: Path | None = None


def components(home: Home, settings: Settings) -> list[Component]:
    """Everything `up` keeps running, in the order of starting. External servers are not ours to start."""
    found = []
    if not settings.redis.url:
        found.append(_redis(home, settings))
        if settings.network.address:
            found.append(_relay(home, settings))
    found.append(_own(home, "gateway", settings, lambda: gateway_url(settings), lambda: gateway_answers(settings)))
    if not settings.store.endpoint:
        found.append(_store(home, settings))
    found.append(_own(home, "fleet", settings))
    return found


def own_command(home: Home, *arguments: str) -> list[str]:
    """A command line of this program. `-P`: the current folder is no place to import from."""
    return [sys.executable, "-P", "-m", "edif_hpc.cli", *arguments, "--home", str(home.root)]


def own_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def _own(
    home: Home,
    name: str,
    settings: Settings,
    address: Callable[[], str] = lambda: "",
    answers: Callable[[], bool] = lambda: True,
) -> Component:
    return Component(
        name=name,
        command=lambda: own_command(home, name),
        address=address,
        answers=answers,
        needs=() if settings.redis.url else ("redis",),
        after=() if name == "gateway" else ("gateway",),
        follows=("redis", "store"),
        environment=own_environment(),
    )


def _redis(home: Home, settings: Settings) -> Component:
    return Component(
        name="redis",
        command=lambda: embedded.redis_command(home, settings),
        address=lambda: f"{LOOPBACK}:{embedded_ports(home)['redis']}",
        answers=lambda: redis_answers(embedded_ports(home)["redis"], home.secret(REDIS_PASSWORDS[Role.GATEWAY])),
        environment={"PATH": "/usr/bin:/bin"},
        folder=home.redis,
    )


def _relay(home: Home, settings: Settings) -> Component:
    return Component(
        name="relay",
        command=lambda: embedded.relay_command(home, settings),
        address=lambda: f"rediss://{in_url(settings.network.address)}:{embedded_ports(home)['redis']}",
        needs=("redis",),
        after=("gateway",),
        follows=("redis",),
        environment=own_environment(),
    )


def _store(home: Home, settings: Settings) -> Component:
    address = settings.network.address
    where = f"https://{in_url(address)}" if address else f"http://{LOOPBACK}"
    return Component(
        name="store",
        command=lambda: embedded.store_command(home, settings),
        address=lambda: f"{where}:{embedded_ports(home)['store']}",
        after=("gateway",),
        environment=embedded.store_environment(home),
        folder=home.store,
    )


def redis_answers(port: int, password: str) -> bool:
    """Whether Redis has loaded its file and lets us in. By hand: redis-py costs a third of a second to import."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=ANSWER_SECONDS) as sock:
            sock.sendall(f"AUTH {Role.GATEWAY} {password}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2:
                part = sock.recv(256)
                if not part:
                    return False
                answer += part
    except OSError:
        return False
    return answer == b"+OK\r\n+PONG\r\n"


def gateway_answers(settings: Settings) -> bool:
    """Whether something at the gateway's address answers a ping, past any proxy that the environment names."""
    url = urlsplit(gateway_url(settings))
    connection = HTTPConnection(url.hostname or "", url.port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == HTTP_OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
