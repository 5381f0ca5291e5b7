"""A login node's loopback belongs to everybody: what may be had from any port of the stack without credentials."""

from __future__ import annotations

import json
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from edif_hpc.core.endpoints import store_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store
from tests.cli.stack import Stack, stack
from tests.support.servers import eventually

NAME = "results/hidden-request/1-token"
CONTENT = b"hidden-content " * 100_000
NUMBERS = ("redis", "store", "store_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc")
PATHS = (
    "/", f"/edif-hpc/{NAME}", "/edif-hpc", "/edif-hpc/?list-type=2", f"/buckets/edif-hpc/{NAME}", "/buckets/",
    "/buckets/?pretty=y", "/dir/status", "/dir/assign", "/dir/lookup?volumeId=1", "/dir/lookup?fileId=1,01&read=yes",
    "/vol/status", "/vol/list", "/cluster/status", "/status", "/ui/index.html", "/stats/disk", "/stats/memory",
    "/metrics", "/debug/pprof/heap", "/debug/vars", "/?Action=ListUsers&Version=2010-05-08", "/admin", "/healthz",
    *(f"/{volume},01" for volume in range(1, 8)),
)  # fmt: skip


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose store holds something worth hiding."""
    with stack(tmp_path_factory.mktemp("exposed")) as made:
        made.up()
        store = Store(store_endpoint(Home(made.home), Settings()))

        def put() -> bool:
            try:
                store.put(NAME, CONTENT)
            except Unavailable:
                return False
            return store.get(NAME) == CONTENT

        eventually(put, 60, "the store taking an object")
        yield made


def listening(made: Stack) -> dict[int, str]:
    """Every TCP port any process of the stack listens on -> address."""
    return {
        connection.laddr.port: connection.laddr.ip
        for process in made.processes()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_everything_listens_on_loopback_alone(holding: Stack):
    ports = listening(holding)
    assert len(ports) == len(NUMBERS) + 1
    assert set(ports.values()) == {"127.0.0.1"}


def ask(port: int, method: str, path: str) -> httpx.Response | None:
    """One request without credentials; None from a port that does not speak HTTP."""
    try:
        return httpx.request(method, f"http://127.0.0.1:{port}{path}", content=b"x", timeout=3, trust_env=False)
    except httpx.HTTPError:
        return None


def test_no_port_tells_objects_to_http_without_credentials(holding: Stack):
    speaking = 0
    for port in listening(holding):
        for path in PATHS:
            answer = ask(port, "GET", path)
            if answer is None:
                break
            # A refusal may repeat the name it was asked for.
            told = answer.content.replace(NAME.encode() if NAME in path else path.encode(), b"")
            assert b"hidden" not in told, (port, path)
            assert b"eyJ" not in told, (port, path)  # how every JSON web token begins
        else:
            speaking += 1
    assert speaking >= 2  # gateway and S3


def test_no_port_takes_objects_over_http_without_credentials(holding: Stack):
    for port in listening(holding):
        for path in ("/edif-hpc/mine", "/buckets/edif-hpc/mine", "/1,01abcdef", "/newbucket"):
            answer = ask(port, "PUT", path)
            if answer is None:
                break
            assert answer.status_code >= 400, (port, path)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("redis", "store")])
def test_every_port_but_s3_wants_a_client_certificate(holding: Stack, name: str):
    port = json.loads((holding.home / "run" / "ports.json").read_text())[name]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        answer = _read(plain)
        # No SETTINGS frame, no page: the server does not speak in the clear.
        assert b"\x04" not in answer[3:4]
        assert not answer.startswith(b"HTTP/") or b" 400 " in answer
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        _speak(context, raw)


def _speak(context: ssl.SSLContext, raw: socket.socket) -> None:
    """Begin HTTP/2 without a client certificate. TLS 1.3 says that one is missing with the first byte that is read."""
    with context.wrap_socket(raw) as wrapped:
        wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        answer = wrapped.recv(1024)
    raise AssertionError(f"it spoke: {answer!r}") if answer else ConnectionError("closed")


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1024)
    except (ConnectionError, TimeoutError):
        return b""


def test_redis_answers_nothing_before_the_password(holding: Stack):
    port = json.loads((holding.home / "run" / "ports.json").read_text())["redis"]
    for command in (b"KEYS *", b"GET x", b"CONFIG GET requirepass", b"INFO", b"SUBSCRIBE x", b"AUTH wrong"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(command + b"\r\n")
            assert _read(sock).startswith((b"-NOAUTH", b"-WRONGPASS", b"-ERR")), command


def test_unix_sockets_of_the_store_are_the_owners_alone(holding: Stack):
    sockets = [
        connection.laddr
        for process in holding.processes()
        for connection in process.net_connections(kind="unix")
        if connection.status == psutil.CONN_NONE and str(connection.laddr).startswith("/")
    ]
    assert sockets
    for path in sockets:
        if Path(path).exists():
            assert stat.S_IMODE(Path(path).stat().st_mode) & 0o077 == 0, path
