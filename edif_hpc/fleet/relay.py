"""The embedded Redis on the network: TLS from outside, plain text to loopback, nothing decided in between.

The servers that come as wheels are built without TLS, and a Redis that has it binds its plain port wherever it binds
the other. So Redis stays on loopback, where the gateway reaches it without a detour, and this process listens at
`network.address` with the same port number. Who may do what is Redis's to say: without a user's password it answers
NOAUTH here as there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import signal
import socket
import ssl
from collections.abc import Sequence

import uvloop

from edif_hpc.core import log

HANDSHAKE_SECONDS = 10.0
CONNECTIONS = 2048
"""A worker holds a handful; whoever comes beyond this is turned away, so that Redis keeps some for the gateway."""
FILES = 2 * CONNECTIONS + 64
"""Each connection is two sockets, and a usual soft limit is 1024."""
CHUNK_BYTES = 256 * 1024
IDLE_PROBE_SECONDS = 60
"""A node that lost its power says no goodbye: the kernel asks after this silence, and gives up after three probes."""
BACKLOG = 512

logger = log.get("fleet")


def command_line(python: str, listen: tuple[str, int], to: tuple[str, int], certificate: str, key: str) -> list[str]:
    """The command that starts a relay."""
    options = {
        "--address": listen[0], "--port": listen[1], "--to-address": to[0], "--to-port": to[1],
        "--certificate": certificate, "--key": key,
    }  # fmt: skip
    return [python, "-P", "-m", __name__, *(str(part) for option in options.items() for part in option)]


class Relay:
    def __init__(self, to: tuple[str, int]) -> None:
        self.to = to
        self._open: set[asyncio.Task[None]] = set()

    async def serve(self, listen: tuple[str, int], context: ssl.SSLContext, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(
            self._taken, *listen, ssl=context, ssl_handshake_timeout=HANDSHAKE_SECONDS, backlog=BACKLOG,
            limit=CHUNK_BYTES,
        )  # fmt: skip
        logger.info("listening", address=listen[0], port=listen[1])
        await stop.wait()
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)  # they are told to end and have nothing to tell

    async def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._open) >= CONNECTIONS:
            writer.close()
            return
        self._open.add(task)
        try:
            await self._carry(reader, writer)
        except asyncio.CancelledError:
            return  # the relay ends; the connection was closed below
        finally:
            self._open.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both directions, until either side ends."""
        _probe_when_idle(writer)
        try:
            inner_reader, inner_writer = await asyncio.open_connection(*self.to, limit=CHUNK_BYTES)
        except OSError as error:
            logger.warning("redis is away", error=str(error))
            writer.close()
            return
        ways = {asyncio.create_task(_pump(reader, inner_writer)), asyncio.create_task(_pump(inner_reader, writer))}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, inner_writer):
                end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):  # either side may vanish at any time
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


def _probe_when_idle(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_PROBE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, IDLE_PROBE_SECONDS // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


async def _main(listen: tuple[str, int], to: tuple[str, int], context: ssl.SSLContext) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await Relay(to).serve(listen, context, stop)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    for name in ("address", "to-address", "certificate", "key"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "to-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(arguments)
    log.configure("relay")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(given.certificate, given.key)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main((given.address, given.port), (given.to_address, given.to_port), context))


if __name__ == "__main__":
    main()
