"""A lean client: a body serialised beforehand, a plain WebSocket, a raw socket: what is measured is the server.

The stock client spends about 30 ms on its own HTTP client, socket set-up and serialisation. This one speaks the same
wire, one connection of each kind per request, with nothing in between.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from dataclasses import dataclass

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
BOUNDARY = "lean-client-boundary"


@dataclass(frozen=True)
class Prepared:
    """A request that only lacks its session. `blob` is what nnsight's RequestModel.serialize made."""

    model_key: str
    blob: bytes
    compress: bool
    env: dict

    def body(self, session_id: str) -> bytes:
        data = json.dumps(
            {"model_key": self.model_key, "session_id": session_id, "compress": self.compress, "env": self.env}
        )
        return b"".join(
            (
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="data"\r\n\r\n{data}\r\n'.encode(),
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="blob"; filename="request"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n".encode(),
                self.blob,
                f"\r\n--{BOUNDARY}--\r\n".encode(),
            )
        )


class RemoteFailure(Exception):
    """The server answered ERROR, or something that is no answer."""


async def frames(reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
    """Frames of one WebSocket, pings answered on the way."""
    while True:
        first, second = await reader.readexactly(2)
        length = second & 127
        if length == 126:
            (length,) = struct.unpack(">H", await reader.readexactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", await reader.readexactly(8))
        body = await reader.readexactly(length)
        if first & 15 == PING:
            writer.write(bytes([128 | PONG, 128 | length]) + bytes(4) + body)
        elif first & 15 == CLOSE:
            return
        else:
            yield first & 15, body


async def post(host: str, port: int, body: bytes, headers: str) -> dict:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        f"POST /request HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n{headers}\r\n".encode()
        + body
    )
    answer = await reader.read()
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RemoteFailure(answer[:500].decode(errors="replace"))
    return json.loads(content)


async def blocking(host: str, port: int, request: Prepared, key: str = "") -> tuple[float, bytes | str]:
    """One blocking request. Returns its seconds and its result: bytes, or the link to a large one."""
    headers = f"ndif-api-key: {key}\r\n" if key else ""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            f"GET /subscribe HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        stream = frames(reader, writer)
        _, hello = await anext(stream)
        await post(host, port, request.body(json.loads(hello)["session_id"]), headers)
        async for kind, body in stream:
            if kind == BINARY:
                return time.perf_counter() - began, body
            status = json.loads(body)
            if status["status"] == "ERROR":
                raise RemoteFailure(status["description"])
            if status["status"] == "COMPLETED":
                return time.perf_counter() - began, status["data"]
        raise RemoteFailure("the socket closed before an end")
    finally:
        writer.close()


async def stream(
    host: str, port: int, request: Prepared, clients: int, total: int, key: str = ""
) -> tuple[float, list[float]]:
    """`total` blocking requests from `clients` at a time. Returns the seconds of the whole and of each."""
    numbers = iter(range(total))
    seconds: list[float] = []

    async def client() -> None:
        for _ in numbers:
            seconds.append((await blocking(host, port, request, key))[0])

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, seconds


async def burst(host: str, port: int, request: Prepared, total: int, key: str = "") -> list[str]:
    """`total` non-blocking requests as fast as they are taken. Returns their ids."""
    headers = f"ndif-api-key: {key}\r\n" if key else ""
    gate = asyncio.Semaphore(16)

    async def one() -> str:
        async with gate:
            return (await post(host, port, request.body(""), headers))["id"]

    return await asyncio.gather(*(one() for _ in range(total)))
