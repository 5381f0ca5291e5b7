"""Running the gateway: one process, one port, an orderly end.

SIGTERM and SIGINT end it: open sockets are told where to find their requests. SIGHUP lets it drain: it gives up the
port, which a successor started with `takeover` may hold already, and serves the sockets it has to their end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from starlette.types import ASGIApp

from edif_hpc.core import log
from edif_hpc.core.endpoints import LINK_SECRET, OWNER_KEY, redis_endpoint, store_endpoint
from edif_hpc.core.errors import ComponentError, EdifError
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings, load
from edif_hpc.core.store import Store

from .app import create_app
from .sessions import Sessions

PING_PATIENCE_SECONDS = 3600.0
"""Clients that run something else do not read their socket, so do not answer pings: the interval is for proxies."""
LARGEST_MESSAGE = 64 * 1024
BACKLOG = 2048
GOODBYE_SECONDS = 10.0
MOST_FILES = 65_536
DRAIN_SECONDS = 3600
"""For downloads that go on after the last socket."""
STEER_SECONDS = 0.2
"""From taking all new connections until the old gateway closes: what it was given before, it has accepted by then."""
SO_ATTACH_REUSEPORT_CBPF, BPF_RETURN, SECOND = 51, 0x06, 1
GC_THRESHOLDS = (50_000, 20, 50)
"""Requests make few cycles; the default threshold of 700 ran the collector several times a request."""

logger = log.get("gateway")


class Server(uvicorn.Server):
    """uvicorn, with a goodbye for sockets and with draining. `accepting` is called once, when it serves since `after`
    seconds."""

    def __init__(
        self, config: uvicorn.Config, sessions: Sessions, accepting: Callable[[], None], after: float = 0.0
    ) -> None:
        super().__init__(config)
        self.sessions = sessions
        self.accepting = accepting
        self.after = after
        self.draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self.draining:
            self.force_exit = True
        self.draining = False
        self.should_exit = True

    def drain(self) -> None:
        self.draining = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().call_later(self.after, self.accepting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        self.sessions.leaving.set()
        logger.info("draining" if self.draining else "ending", sockets=len(self.sessions.open))
        if self.draining:
            self.config.timeout_graceful_shutdown = DRAIN_SECONDS
            await self._served()
        self.sessions.end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.sessions.idle.wait(), GOODBYE_SECONDS)
        await super().shutdown()

    async def _served(self) -> None:
        """Until the last socket has gone, or a second signal says that it is enough."""
        while self.draining:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.sessions.idle.wait(), 1.0)
                return


def listen(host: str, port: int, *, takeover: bool) -> socket.socket:
    """The listening socket. A running gateway of the same user shares its port with one that takes over.

    Raises:
        ComponentError: the port is taken, or not ours to take.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not takeover:
            with socket.socket(family, kind, proto) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        if takeover:
            _steer_here(sock)
        sock.setblocking(False)
    except OSError as error:
        raise ComponentError(
            f"The gateway cannot listen on {host}:{port} ({error.strerror}); choose another with gateway.port."
        ) from error
    return sock


def _steer_here(sock: socket.socket) -> None:
    """Have the kernel give every new connection to this socket, the second of the two that share the port.

    What still waited in the old one's backlog when that closes would be reset. Once the old one is gone no socket has
    this number, and the kernel chooses among those there are.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, SECOND))
    with contextlib.suppress(OSError):  # a kernel without it shares new connections out until the old one closes
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("HP", 1, ctypes.addressof(program)))


def serve(
    home: Home, settings: Settings, *, takeover: bool = False, accepting: Callable[[], None] = lambda: None
) -> None:
    """Run the gateway until it is told to end. `accepting` is called when it serves: a predecessor may drain then.

    Raises:
        EdifError: it cannot start; the sentence says why.
    """
    log.configure("gateway", settings.log_level)
    redis, store = redis_endpoint(home, settings), Store(store_endpoint(home, settings))
    gateway = create_app(
        settings,
        redis.client(),
        store,
        cache=Path(settings.models.cache).expanduser() if settings.models.cache else home.hub,
        spool=home.spool,
        link_secret=home.secret(LINK_SECRET),
        owner_key=home.secret(OWNER_KEY),
    )
    sock = listen(settings.gateway.host, settings.gateway.port, takeover=takeover)
    server = Server(_config(gateway.app, settings), gateway.sessions, accepting, STEER_SECONDS if takeover else 0.0)
    _raise_file_limit()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(server, sock))
    logger.info("ended")


def _config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="websockets-sansio",
        ws_ping_interval=settings.gateway.ping_seconds,
        ws_ping_timeout=PING_PATIENCE_SECONDS,
        ws_max_size=LARGEST_MESSAGE,
        ws_per_message_deflate=False,
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # who asks is decided in `auth`, from the true peer
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(GOODBYE_SECONDS),
    )


async def _run(server: Server, sock: socket.socket) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.drain)
    logger.info("listening", address=":".join(str(part) for part in sock.getsockname()[:2]))
    await server.serve(sockets=[sock])


def _raise_file_limit() -> None:
    """Each client holds a socket, and a usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: list[str] | None = None) -> int:
    """`python -m edif_hpc.gateway.main --home DIR`: the gateway without the command line's own imports."""
    parser = argparse.ArgumentParser(prog="edif-hpc gateway")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--takeover", action="store_true", help="share the port with a running gateway that drains")
    options = parser.parse_args(arguments)
    home = Home.locate(options.home)
    try:
        home.check()
        settings = load(options.config or home.config, must_exist=options.config is not None).settings
        serve(home, settings, takeover=options.takeover)
    except EdifError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
