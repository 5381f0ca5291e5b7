"""/subscribe: one socket, one session, any number of requests.

The stock client has no timeout and does not reconnect, so a terminal status is all it waits for: nothing is dropped
between the first frame and the last, and a socket that the service must close says ERROR for everything still open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

from redis.exceptions import RedisError
from starlette.websockets import WebSocket, WebSocketDisconnect

from edif_hpc.core import log
from edif_hpc.core.errors import EdifError, Unavailable
from edif_hpc.core.queue import Event
from edif_hpc.core.wire import Status, status_message

from .answers import Answers
from .auth import Auth
from .errors import json_error, unavailable
from .sessions import Session, Sessions
from .stats import Stats

GOING_AWAY = 1001
RETRY_SECONDS = 1.0
LEFT = (
    "The gateway is ending and closes this connection; your request goes on. Find its result with "
    "`edif-hpc result {request}` or GET /response/{request}."
)

logger = log.get("gateway")


class Subscribe:
    def __init__(self, auth: Auth, sessions: Sessions, answers: Answers, stats: Stats) -> None:
        self.auth = auth
        self.sessions = sessions
        self.answers = answers
        self.stats = stats

    async def socket(self, websocket: WebSocket) -> None:
        try:
            user = await self.auth.user(websocket)
        except EdifError as error:
            await websocket.send_denial_response(json_error(error))
            return
        except (RedisError, OSError) as error:
            await websocket.send_denial_response(json_error(unavailable(error)))
            return
        session = self.sessions.add(user.name)
        announcing = asyncio.create_task(self._announce(session))
        watching: asyncio.Task[None] | None = None
        try:
            await websocket.accept()
            await websocket.send_text(json.dumps({"session_id": session.session_id}))
            watching = asyncio.create_task(self._watch(websocket, session))
            await self._serve(websocket, session)
        except (WebSocketDisconnect, OSError):
            pass  # the client left; its requests go on
        finally:
            self.sessions.remove(session)
            for task in (announcing, watching):
                if task is not None:
                    task.cancel()

    async def _announce(self, session: Session) -> None:
        """Beside the greeting, which need not wait: a request that reaches this gateway is joined without it.

        Redis may be away; then the next refresh says it.
        """
        try:
            await self.sessions.announce(session)
        except (RedisError, OSError) as error:
            logger.warning("session is not announced yet", error=str(error))

    async def _watch(self, websocket: WebSocket, session: Session) -> None:
        """Read, so that pings, pongs and the end are seen; clients say nothing."""
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass
        session.gone = True
        session.inbox.put_nowait(None)

    async def _serve(self, websocket: WebSocket, session: Session) -> None:
        base_url = self.answers.base_url(websocket)
        while True:
            item = await session.inbox.get()
            if item is None:
                break
            frame = await self._frame(session, item, base_url)
            if isinstance(frame, bytes):
                await websocket.send_bytes(frame)
            else:
                await websocket.send_text(frame)
            self.stats.frames += 1
        if self.sessions.ending and not session.gone:
            for request_id in list(session.followings):
                sentence = LEFT.format(request=request_id)
                await websocket.send_text(json.dumps(status_message(request_id, Status.ERROR, sentence)))
            with contextlib.suppress(RuntimeError):  # the client closed at the same moment
                await websocket.close(GOING_AWAY)

    async def _frame(self, session: Session, item: tuple[str, Event], base_url: str) -> str | bytes:
        """The frame for one event. A result that cannot be fetched now is fetched when Redis is back."""
        while True:
            try:
                return await self.answers.frame(*item, base_url)
            except (RedisError, OSError, Unavailable) as error:
                if session.gone:
                    raise WebSocketDisconnect from error
                logger.warning("result cannot be fetched yet", request=item[0], error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
