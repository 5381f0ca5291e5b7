"""The open sockets: whose they are and which requests they carry.

A session id is a secret that a client echoes with its request, and counts only from the key that opened the socket.
Requests that reach this gateway are joined to their socket before they are submitted; those that reach another one (a
successor that took over the port) by the bell; and those whose bell was lost by looking at the user's own requests.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from edif_hpc.core.queue import Event, Events, keys

from .follow import Follower, Following

TTL_SECONDS = 120
CLOCK_SLACK_SECONDS = 60.0
"""Between this machine's clock and Redis's, when looking for requests younger than a socket."""


@dataclass(eq=False)
class Session:
    user: str
    session_id: str = field(default_factory=lambda: secrets.token_hex(16))
    opened: float = field(default_factory=time.time)
    inbox: asyncio.Queue[tuple[str, Event] | None] = field(default_factory=asyncio.Queue)
    """Events to send, in order; None when the socket is gone or the gateway ends."""
    followings: dict[str, Following] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    gone: bool = False

    def put(self, request_id: str, event: Event) -> None:
        if event.status.terminal:
            self.settled.add(request_id)
            self.followings.pop(request_id, None)
        self.inbox.put_nowait((request_id, event))


class Sessions:
    def __init__(self, redis: Redis, events: Events) -> None:
        self.redis: Any = redis
        self.follower = Follower(events, self._heard)
        self.open: dict[str, Session] = {}
        self._closed: list[str] = []
        self.idle = asyncio.Event()
        """Set while no socket is open."""
        self.idle.set()
        self.ending = False
        self.leaving = asyncio.Event()
        """Set once this gateway has given up its port: who waits here for news had better ask again, of another."""

    def add(self, user: str) -> Session:
        session = Session(user)
        self.open[session.session_id] = session
        self.idle.clear()
        return session

    async def announce(self, session: Session) -> None:
        """Let every gateway and the submission know whose session this is."""
        await self.redis.set(keys.session(session.session_id), session.user, ex=TTL_SECONDS)

    def remove(self, session: Session) -> None:
        """Forget a socket. Its name in Redis goes with the next refresh: one command for all, and none on the way."""
        self.open.pop(session.session_id, None)
        if not self.open:
            self.idle.set()
        for following in list(session.followings.values()):
            self.follower.unfollow(following)
        self._closed.append(session.session_id)

    def join(self, session_id: str, user: str, request_id: str, *, read: bool = False) -> Session | None:
        """Join a request to its socket, if that is open here and the same user's."""
        session = self.open.get(session_id)
        if session is None or session.user != user:
            return None
        if request_id not in session.followings and request_id not in session.settled:
            session.followings[request_id] = self.follower.follow(request_id, session.put, read=read)
        return session

    def part(self, session: Session, request_id: str) -> None:
        """Undo a join: the submission failed."""
        following = session.followings.pop(request_id, None)
        if following is not None:
            self.follower.unfollow(following)

    def _heard(self, session_id: str, request_id: str) -> None:
        session = self.open.get(session_id)
        if session is not None:  # the submission checked whose it is
            self.join(session_id, session.user, request_id, read=True)

    def end(self) -> None:
        """Have every socket say goodbye: the gateway ends."""
        self.ending = True
        for session in self.open.values():
            session.inbox.put_nowait(None)

    async def refresh(self) -> None:
        """Keep the sessions known while their sockets are open, and no longer."""
        closed, self._closed = self._closed, []
        pipeline = self.redis.pipeline(transaction=False)
        for session in self.open.values():
            pipeline.set(keys.session(session.session_id), session.user, ex=TTL_SECONDS)
        if closed:
            pipeline.delete(*(keys.session(session_id) for session_id in closed))
        await pipeline.execute()

    async def find_lost(self) -> None:
        """Requests whose bell rang while nobody here could hear, found among their user's recent ones."""
        empty = [session for session in self.open.values() if not session.followings and not session.settled]
        oldest: dict[str, float] = {}
        for session in empty:
            oldest[session.user] = min(session.opened, oldest.get(session.user, session.opened))
        for user, opened in oldest.items():
            since = int((opened - CLOCK_SLACK_SECONDS) * 1000)
            names = [name.decode() for name in await self.redis.zrangebyscore(keys.user(user), since, "+inf")]
            pipeline = self.redis.pipeline(transaction=False)
            for name in names:
                pipeline.hget(keys.request(name), "session")
            for name, found in zip(names, await pipeline.execute() if names else [], strict=True):
                if found:
                    self.join(found.decode(), user, name, read=True)
