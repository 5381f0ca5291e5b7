"""Around every HTTP request: errors become sentences, and one line of log says what happened.

An answer that comes before the body was read is followed by reading a little more of it: closing a connection with
unread bytes resets it, and the client would see that instead of the sentence.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from redis.exceptions import RedisError
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edif_hpc.core import log
from edif_hpc.core.errors import EdifError

from .errors import json_error, unavailable
from .stats import Stats

LINGER_BYTES = 64 * 1024 * 1024
LINGER_SECONDS = 5.0
CLIENT_LEFT = 499

logger = log.get("gateway")


class Front:
    def __init__(self, app: ASGIApp, stats: Stats, labels: dict[Any, str]) -> None:
        self.app = app
        self.stats = stats
        self.labels = labels
        """Endpoint -> its path as written, for metrics: paths as asked would be without number."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = Exchange(scope, receive, send)
            try:
                await exchange.run(self.app)
            finally:
                label = self.labels.get(scope.get("endpoint"), "other")
                self.stats.answered(label, exchange.status, exchange.log())
        else:
            await self.app(scope, receive, send)


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.began = time.perf_counter()
        self.status = 0
        self.body_read = scope["method"] in ("GET", "HEAD")
        self.notes: dict[str, Any] = scope.setdefault("edif_notes", {})
        """What handlers add to the log line: user, request."""

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except ClientDisconnect:
            self.status = self.status or CLIENT_LEFT
        except Exception as error:
            if not self.status:
                await self._refuse(error)
                return
            # Too late for a sentence. The server closes the connection, and Content-Length tells the client.
            logger.warning("answer cut off", exc_info=error, **self.notes)

    def log(self) -> float:
        """Write the line; returns the seconds it took to answer."""
        seconds = time.perf_counter() - self.began
        logger.info(
            "http", method=self.scope["method"], path=self.scope["path"], status=self.status,
            ms=round(seconds * 1000, 2), **self.notes,
        )  # fmt: skip
        return seconds

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self.body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def _refuse(self, error: Exception) -> None:
        try:
            await self._answer(json_error(_refusal(error)))
        except Exception:  # not foreseen: the one place that answers for all of them
            incident = secrets.token_hex(6)
            logger.exception("unexpected", incident=incident, exc_info=error, **self.notes)
            await self._answer(
                json_error(EdifError(f"Something failed inside the service; tell its admin the incident {incident}."))
            )

    async def _answer(self, response: Response) -> None:
        if self.body_read:
            await response(self.scope, self.receive, self.send)
            return
        response.headers["connection"] = "close"
        await self.send(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self.send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        await self._linger()
        await self.send({"type": "http.response.body", "body": b""})

    async def _linger(self) -> None:
        read = 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.body_read and read < LINGER_BYTES:
                    read += len((await self.receive()).get("body", b""))
        except TimeoutError:
            return


def _refusal(error: Exception) -> EdifError:
    if isinstance(error, EdifError):
        return error
    if isinstance(error, RedisError):
        return unavailable(error)
    raise error
