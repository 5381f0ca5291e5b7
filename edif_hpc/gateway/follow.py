"""Following many requests at once: one doorbell connection, one XREAD for all that rang.

The streams are the truth and a bell only says where to look, so a lost bell costs time, never an event: everything
followed is read again after a reconnection and every few seconds. While Redis is away nothing is dropped; reading goes
on from the cursors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from edif_hpc.core import log
from edif_hpc.core.queue import Event, Events, keys
from edif_hpc.core.queue.events import START
from edif_hpc.core.wire import Status

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 1.0
BATCH = 500
"""Streams in one XREAD."""
GATHER_SECONDS = 0.025
"""How long bells of requests that go on are gathered into one read; the end of a request is read at once."""

logger = log.get("gateway")

Sink = Callable[[str, Event], None]
AWAY = (RedisError, OSError)


@dataclass(eq=False)
class Following:
    """One reader of one request: `sink` gets every event after `cursor`, in order, until the terminal one."""

    request_id: str
    sink: Sink
    cursor: str = START
    known: bool = False
    """Whether an event was ever seen: until then the request may still be on its way into Redis."""
    checks: int = field(default=0)


class Follower:
    def __init__(self, events: Events, on_session: Callable[[str, str], None]) -> None:
        self.events = events
        self.on_session = on_session
        self.followings: dict[str, set[Following]] = {}
        self.connected = False
        self._rung: set[str] = set()
        self._ended: set[str] = set()
        self._stir = asyncio.Event()
        self._gathering: asyncio.TimerHandle | None = None
        self.on_connected: Callable[[], None] = lambda: None

    def follow(self, request_id: str, sink: Sink, cursor: str = START, *, read: bool = True) -> Following:
        """Start following; `read=False` for a request that is submitted only after this."""
        following = Following(request_id, sink, cursor)
        self.followings.setdefault(request_id, set()).add(following)
        if read:
            self.ring(request_id)
        return following

    def unfollow(self, following: Following) -> None:
        readers = self.followings.get(following.request_id)
        if readers is not None:
            readers.discard(following)
            if not readers:
                del self.followings[following.request_id]

    def ring(self, *request_ids: str, at_once: bool = True) -> None:
        self._rung.update(request_id for request_id in request_ids if request_id in self.followings)
        if not self._rung:
            return
        if at_once:
            self._stir.set()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._stir.set)

    def ring_all(self) -> None:
        self.ring(*self.followings)

    async def listen(self) -> None:
        """Hear the bells for ever, through every absence of Redis."""
        delay = FIRST_RETRY_SECONDS
        while True:
            try:
                async for _, message in self.events.listen(keys.BELL_REQUESTS):
                    delay = FIRST_RETRY_SECONDS
                    self._hear(message)
            except AWAY as error:
                if self.connected:
                    logger.warning("doorbell lost", error=str(error))
            self.connected = False
            await asyncio.sleep(delay)
            delay = min(delay * 2, LAST_RETRY_SECONDS)

    def _hear(self, message: str) -> None:
        if not message:
            self.connected = True
            self.ring_all()
            self.on_connected()
            return
        request_id, _, more = message.partition(" ")
        if more and more != keys.THE_END:
            self.on_session(more, request_id)
        if more == keys.THE_END and request_id in self.followings:
            self._ended.add(request_id)
        self.ring(request_id, at_once=more == keys.THE_END)

    async def pump(self) -> None:
        """Read what rang and hand it out, for ever. Bells that ring meanwhile share the next read."""
        delay = FIRST_RETRY_SECONDS
        while True:
            await self._stir.wait()
            self._stir.clear()
            if self._gathering is not None:
                self._gathering.cancel()
                self._gathering = None
            rung, self._rung = self._rung, set()
            ended, self._ended = self._ended, set()
            batch = [request_id for request_id in rung if request_id in self.followings]
            try:
                for start in range(0, len(batch), BATCH):
                    await self._read(batch[start : start + BATCH], ended)
                delay = FIRST_RETRY_SECONDS
            except AWAY as error:
                logger.warning("events cannot be read", error=str(error), followed=len(self.followings))
                self.ring(*batch)
                await asyncio.sleep(delay)
                delay = min(delay * 2, LAST_RETRY_SECONDS)

    async def _read(self, request_ids: Iterable[str], ended: set[str]) -> None:
        cursors = {
            request_id: min((reader.cursor for reader in self.followings[request_id]), key=_order)
            for request_id in request_ids
            if request_id in self.followings
        }
        for request_id, events in (await self.events.read(cursors, ended & cursors.keys())).items():
            for following in list(self.followings.get(request_id, ())):
                for event in events:
                    self.deliver(following, event)

    def deliver(self, following: Following, event: Event) -> None:
        """Hand one event to one reader, unless it had it; the terminal one ends the following."""
        if _order(event.cursor) <= _order(following.cursor):
            return
        following.cursor = event.cursor
        following.known = True
        following.checks = 0
        following.sink(following.request_id, event)
        if event.status.terminal:
            self.unfollow(following)

    async def drop_forgotten(self) -> None:
        """End what Redis no longer knows (it lost its data): a reader would wait for ever."""
        followed = [
            following for readers in list(self.followings.values()) for following in readers if self._due(following)
        ]
        if not followed:
            return
        pipeline = self.events.redis.pipeline(transaction=False)
        for following in followed:
            pipeline.exists(keys.request(following.request_id))
        for following, exists in zip(followed, await pipeline.execute(), strict=True):
            if not exists:
                logger.error("request is gone from Redis", request=following.request_id)
                sentence = "The service lost this request, since its Redis lost its data; submit it again."
                lost = Event(f"{2**63}-0", Status.ERROR, sentence, None, None, 0.0)
                self.deliver(following, lost)

    @staticmethod
    def _due(following: Following) -> bool:
        """Looked at on every other tick, so that a request being submitted right now is left alone."""
        following.checks += 1
        return following.checks >= 2


def _order(cursor: str) -> tuple[int, int]:
    milliseconds, _, sequence = cursor.partition("-")
    return int(milliseconds), int(sequence or 0)
