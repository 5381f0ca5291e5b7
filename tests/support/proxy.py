"""A TCP proxy that misbehaves as networks do: slow, distant, cut, silent. For tests and benchmarks.

It passes bytes between a client and one server and can, at any time and for all or for new connections:

- limit the bandwidth of each direction of all connections together, and delay every byte (a distant machine);
- reset what is open, refuse what is new (a server that restarts);
- go silent: keep connections open and pass nothing on (a laptop that slept, a firewall that forgot);
- cut the answer of one connection after so many bytes, or flip a bit in it.

It counts what it passed on. It runs in a thread with a loop of its own, so tests may be sync or async. What it must
not know: what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CHUNK = 16 * 1024
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no seconds: closing sends RST instead of FIN."""


@dataclass
class Counters:
    """What was passed on, over all connections."""

    connections: int = 0
    up_bytes: int = 0
    """From clients."""
    down_bytes: int = 0
    """To clients."""


class Proxy:
    """Made by `proxied`. The settings may be changed while it runs.

    Attributes:
        bytes_per_second: of each direction, shared by all connections; 0 for no limit.
        delay_seconds: how much later bytes arrive, each way.
        silent: nothing is passed on, nothing is closed.
        refusing: new connections are reset.
    """

    def __init__(self, host: str, port: int) -> None:
        self.bytes_per_second = 0.0
        self.delay_seconds = 0.0
        self.silent = False
        self.refusing = False
        self.counters = Counters()
        self.port = 0
        self._server = (host, port)
        self._cuts: list[int] = []
        self._flips: list[int] = []
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._listening: asyncio.Server | None = None
        self._free_at = {"up": 0.0, "down": 0.0}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    def cut_after(self, *down_bytes: int) -> None:
        """Reset the next connections to carry so many bytes to the client, one for each number, once they did."""
        self._cuts.extend(down_bytes)

    def cut_no_more(self) -> None:
        """Forget the cuts that nobody came to."""
        self._cuts.clear()

    def flip_at(self, *down_bytes: int) -> None:
        """Flip a bit in the byte at this place of what next connections carry to the client, one for each number."""
        self._flips.extend(down_bytes)

    def reset(self) -> None:
        """Reset every open connection."""
        self._call(lambda: [link.reset() for link in list(self._links)])

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Reset what is open and refuse what is new, while the block runs."""
        self.refusing = True
        self.reset()
        try:
            yield
        finally:
            self.refusing = False

    # -- the loop's own ------------------------------------------------------------------------------------------------

    def _call(self, action: Callable[[], Any]) -> Any:
        async def act() -> Any:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(10)

    async def _start(self) -> None:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        self.port = self._listening.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        if self.refusing:
            link.reset()
            return
        self._links.add(link)
        self.counters.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._server, limit=CHUNK)
            link.writers.append(far_writer)
            ways = [self._pass(reader, far_writer, self._up), self._pass(far_reader, writer, self._down(link))]
            await asyncio.gather(*ways)
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            for each in link.writers:
                each.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        count: Callable[[bytes], Awaitable[bytes]],
    ) -> None:
        """One way of a connection, until its end; what comes is held back for the delay, in its order."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

        async def read() -> None:
            with contextlib.suppress(OSError):  # a reset is an end as well
                while data := await reader.read(CHUNK):
                    await held.put((time.monotonic() + self.delay_seconds, data))
            await held.put((time.monotonic() + self.delay_seconds, b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                at, data = await held.get()
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                while self.silent:
                    await asyncio.sleep(0.01)
                if not data:
                    break
                writer.write(await count(data))
                await writer.drain()
            with contextlib.suppress(OSError):
                writer.write_eof()
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await reading

    async def _up(self, data: bytes) -> bytes:
        await self._paced("up", len(data))
        self.counters.up_bytes += len(data)
        return data

    def _down(self, link: _Link) -> Callable[[bytes], Awaitable[bytes]]:
        async def count(data: bytes) -> bytes:
            await self._paced("down", len(data))
            before, link.down = link.down, link.down + len(data)
            if self._cuts and link.down >= self._cuts[0]:
                self._cuts.pop(0)
                link.reset()
                raise ConnectionResetError
            if self._flips and link.down > self._flips[0]:
                place = max(0, self._flips.pop(0) - before)
                data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            self.counters.down_bytes += len(data)
            return data

        return count

    async def _paced(self, way: str, size: int) -> None:
        if self.bytes_per_second:
            now = time.monotonic()
            self._free_at[way] = max(now, self._free_at[way]) + size / self.bytes_per_second
            await asyncio.sleep(self._free_at[way] - now)

    async def _end(self) -> None:
        assert self._listening is not None
        self._listening.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Link:
    """One client's connection and ours behind it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.down = 0

    def reset(self) -> None:
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()


@contextmanager
def proxied(url: str, **settings: float | bool) -> Iterator[Proxy]:
    """A proxy before the server at `url`, on a port of its own; `settings` are attributes of `Proxy`."""
    parts = urlsplit(url)
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 80)
    for name, value in settings.items():
        setattr(proxy, name, value)
    thread = threading.Thread(target=proxy._loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(proxy._start(), proxy._loop).result(10)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy._end(), proxy._loop).result(10)
        proxy._loop.call_soon_threadsafe(proxy._loop.stop)
        thread.join(10)
        proxy._loop.close()
