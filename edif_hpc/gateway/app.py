"""The gateway put together: values in, an ASGI application out. Routes are all here, to be read at one glance."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import Receive, Scope, Send

from edif_hpc.core import log
from edif_hpc.core.apikeys import ApiKeys
from edif_hpc.core.queue import Events, Queue
from edif_hpc.core.registry import Registry
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store

from .answers import Answers
from .auth import Auth
from .control import Control
from .door import Door
from .errors import NotFound
from .front import Front
from .intake import Intake
from .metrics import Metrics
from .observed import Observed
from .overview import Overview
from .public import Public
from .pulse import Pulse
from .records import Records
from .results import Results
from .scripts import Scripts
from .sessions import Sessions
from .stats import Stats
from .subscribe import Subscribe

logger = log.get("gateway")


@dataclass
class Gateway:
    """The application and what its server must reach to end it well."""

    app: Front
    sessions: Sessions


def create_app(
    settings: Settings,
    redis: Redis,
    store: Store,
    *,
    cache: Path,
    spool: Path,
    link_secret: str,
    owner_key: str,
) -> Gateway:
    """Build the gateway around its servers.

    Args:
        cache: the Hugging Face hub cache that the workers load from.
        spool: a private folder for large payloads while they are received.
        link_secret: signs result links.
        owner_key: the home's own key, made known in Redis.
    """
    limits, stats = settings.limits, Stats()
    queue, events, registry, keys = Queue(redis, limits), Events(redis), Registry(redis), ApiKeys(redis)
    observed = Observed(registry, settings.worker.required_isolation)
    auth = Auth(keys, observed, trust_owner=settings.gateway.trust_owner)
    sessions = Sessions(redis, events)
    answers = Answers(
        queue,
        store,
        secret=link_secret,
        public_url=settings.gateway.public_url,
        link_seconds=settings.gateway.link_seconds,
        presigned=settings.store.delivery == "presigned",
    )
    door = Door(settings, cache, observed)
    intake = Intake(settings, auth, door, queue, store, sessions, spool)
    scripts = Scripts(settings, auth, door, intake)
    subscribe = Subscribe(auth, sessions, answers, stats)
    results = Results(queue, store, link_secret, stats)
    records = Records(auth, queue, events, answers, sessions)
    control = Control(auth, queue, store, door, limits)
    public = Public(auth, observed, registry, cache)
    overview = Overview(auth, observed, queue, public)
    metrics = Metrics(auth, queue, observed, sessions, stats)
    pulse = Pulse(redis, keys, sessions, intake, owner_key=owner_key, inline_bytes=settings.redis.inline_total_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        loops = [sessions.follower.listen(), sessions.follower.pump(), pulse.run()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        for task in tasks:
            task.add_done_callback(_loop_ended)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        results.close()
        await redis.aclose()

    routes: list[Route | WebSocketRoute] = [
        Route("/request", intake.post, methods=["POST"]),
        WebSocketRoute("/subscribe", subscribe.socket),
        Route("/response/{request_id}", records.response),
        Route("/result/{request_id}", results.get),
        Route("/ping", public.ping),
        Route("/status", public.status),
        Route("/env", public.env),
        Route("/whoami", public.whoami),
        Route("/metrics", metrics.get),
        Route("/api/scripts", scripts.post, methods=["POST"]),
        Route("/api/requests", records.list_recent),
        Route("/api/dead", records.list_dead),
        Route("/api/requests/{request_id}", records.show),
        Route("/api/requests/{request_id}", control.delete, methods=["DELETE"]),
        Route("/api/requests/{request_id}/cancel", control.cancel, methods=["POST"]),
        Route("/api/requests/{request_id}/retry", control.retry, methods=["POST"]),
        Route("/api/requests/{request_id}/events", records.history),
        Route("/api/workers", overview.workers),
        Route("/api/models", overview.models),
    ]
    router = Router(routes, redirect_slashes=False, default=_nothing_here, lifespan=lifespan)
    return Gateway(Front(router, stats, {route.endpoint: route.path for route in routes}), sessions)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    raise NotFound(f"There is nothing at {scope['path'][:200]!r} on this service.")


def _loop_ended(task: asyncio.Task[None]) -> None:
    """The loops run for ever; one that does not leaves the gateway deaf, which must not go unseen."""
    if not task.cancelled() and task.exception() is not None:
        logger.critical("a loop of the gateway died", exc_info=task.exception())
        signal.raise_signal(signal.SIGTERM)  # an orderly end; whoever keeps the gateway running starts it again
