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
BURST_CONNECTIONS = 16
"""Submissions on their way at once."""
POLLERS = 4
POLL_SECONDS = 0.05


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


@dataclass(frozen=True)
class Answer:
    """One finished request. `result` is its bytes, or the link to a large one."""

    request_id: str
    seconds: float
    result: bytes | str


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
    what = f"Content-Length: {len(body)}\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    return await _exchange(host, port, "POST /request", what + headers, body)


async def get(host: str, port: int, path: str, headers: str) -> dict:
    return await _exchange(host, port, f"GET {path}", headers, b"")


async def _exchange(host: str, port: int, what: str, headers: str, body: bytes) -> dict:
    """One HTTP exchange over a connection of its own."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"{what} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n{headers}\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RemoteFailure(answer[:500].decode(errors="replace"))
    return json.loads(content)


async def blocking(host: str, port: int, request: Prepared, key: str = "") -> Answer:
    """One blocking request."""
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
        request_id = (await post(host, port, request.body(json.loads(hello)["session_id"]), headers))["id"]
        async for kind, body in stream:
            if kind == BINARY:
                return Answer(request_id, time.perf_counter() - began, body)
            status = json.loads(body)
            if status["status"] == "ERROR":
                raise RemoteFailure(status["description"])
            if status["status"] == "COMPLETED":
                return Answer(request_id, time.perf_counter() - began, status["data"])
        raise RemoteFailure("the socket closed before an end")
    finally:
        writer.close()


async def throughput(host: str, port: int, request: Prepared, clients: int, seconds: float, key: str = "") -> float:
    """Requests per second that `clients` get answered, each sending its next one when it has its answer."""
    done = 0
    began = time.perf_counter()

    async def client() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await blocking(host, port, request, key)
            done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - began)


async def burst(host: str, port: int, request: Prepared, total: int, key: str = "") -> float:
    """Completions per second of `total` non-blocking requests, submitted at once, each polled until it has ended."""
    headers = f"ndif-api-key: {key}\r\n" if key else ""
    gate = asyncio.Semaphore(BURST_CONNECTIONS)

    async def submit() -> str:
        async with gate:
            return (await post(host, port, request.body(""), headers))["id"]

    async def poll(request_id: str) -> None:
        while True:
            status = await get(host, port, f"/response/{request_id}", headers)
            if status["status"] == "ERROR":
                raise RemoteFailure(status["description"])
            if status["status"] == "COMPLETED":
                return
            await asyncio.sleep(POLL_SECONDS)

    began = time.perf_counter()
    waiting = await asyncio.gather(*(submit() for _ in range(total)))
    ids = iter(waiting)

    async def poller() -> None:
        for request_id in ids:
            await poll(request_id)

    await asyncio.gather(*(poller() for _ in range(POLLERS)))
    return total / (time.perf_counter() - began)
