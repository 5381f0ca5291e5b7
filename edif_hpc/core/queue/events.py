"""Reading what happened to requests: the stream is the truth, pub/sub only the doorbell.

One pub/sub connection serves a whole gateway. A reader that comes back names the last event it saw and reads on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, replace
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as ConnectionLost

from ..wire import Status
from . import keys

START = "0-0"
SILENCE_SECONDS = 5.0
ALONG_BYTES = 64 * 1024
"""A larger result is read when its turn to be sent has come: it would wait in memory for a slow client."""


@dataclass(frozen=True)
class Event:
    """One status change or log line.

    Args:
        cursor: its place in the stream; reading goes on after it.
        data: on COMPLETED where the result lies: `{"inline": bytes}` or `{"object": key, "bytes": n}`.
        at: Unix time in seconds, of Redis's clock.
        result: an inline result that was read along with it, if small.
    """

    cursor: str
    status: Status
    description: str
    data: dict[str, Any] | None
    meta: dict[str, Any] | None
    at: float
    result: bytes | None = None

    @classmethod
    def from_fields(cls, cursor: str, fields: dict[bytes, bytes]) -> Event:
        text = {name.decode(): value.decode() for name, value in fields.items()}
        return cls(
            cursor=cursor,
            status=Status(text["status"]),
            description=text.get("description", ""),
            data=json.loads(text["data"]) if text.get("data") else None,
            meta=json.loads(text["meta"]) if text.get("meta") else None,
            at=float(text.get("at", "0")) / 1000,
        )


class Events:
    """Reads event streams. Connections come from the client it is given."""

    def __init__(self, redis: Redis) -> None:
        # redis-py annotates every answer as bytes | str; which of them it is depends on the connection, ours is bytes.
        self.redis: Any = redis

    async def read(self, cursors: dict[str, str], ended: Collection[str] = ()) -> dict[str, list[Event]]:
        """What is new, for many requests in one round trip.

        Args:
            cursors: request id -> last cursor seen.
            ended: those of them that are known to have ended: their small results are read along.
        """
        if not cursors:
            return {}
        streams = {keys.events(request_id): cursor for request_id, cursor in cursors.items()}
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.xread(streams)
        for request_id in ended:
            pipeline.get(keys.result(request_id))
        found, *results = await pipeline.execute()
        names = {keys.events(request_id): request_id for request_id in cursors}
        events = {
            names[stream.decode()]: [Event.from_fields(cursor.decode(), fields) for cursor, fields in entries]
            for stream, entries in _pairs(found)
        }
        for request_id, result in zip(ended, results, strict=True):
            if result is not None and len(result) <= ALONG_BYTES and (read := events.get(request_id)):
                read[-1] = replace(read[-1], result=result)
        return events

    async def listen(self, *channels: str) -> AsyncIterator[tuple[str, str]]:
        """(channel, message) pairs, with "" for a message once a subscription stands: read what was missed then.

        A silent connection is probed, since one that a firewall dropped looks like one on which nothing happens.

        Raises:
            redis.exceptions.ConnectionError: the connection is gone; listen again.
        """
        async with self.redis.pubsub() as pubsub:
            await pubsub.subscribe(*channels)
            probed = False
            while True:
                message = await pubsub.get_message(timeout=SILENCE_SECONDS)
                if message is None:
                    if probed:
                        raise ConnectionLost(f"Redis is silent on {', '.join(channels)}.")
                    await pubsub.ping()
                probed = message is None
                if message is not None and message["type"] in ("subscribe", "message"):
                    said = message["data"].decode() if message["type"] == "message" else ""
                    yield message["channel"].decode(), said


def _pairs(found: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    # RESP2 answers a list of pairs, RESP3 a mapping whose values are wrapped once more.
    if isinstance(found, dict):
        return [
            (stream, entries[0] if entries and isinstance(entries[0], list) else entries)
            for stream, entries in found.items()
        ]
    return list(found)
