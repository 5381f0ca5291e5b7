"""What the fleet tells people: why a pool starts nothing, for `edif-hpc status` and for a webhook.

The sentences are a pure function of what is seen. A webhook hears of each kind of trouble once, when it begins.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import httpx

from edif_hpc.core import log

from .decide import Pool

SILENT_SECONDS = 300.0
"""Slurm may be restarted without anybody being told."""
POST_SECONDS = 10.0
RETRY_SECONDS = (5.0, 30.0, 120.0)

logger = log.get("fleet")


class Kind(StrEnum):
    """What a notice is about. Only the first three are worth waking somebody."""

    PAUSED = "paused"
    STOPPED = "stopped"
    SILENT = "silent"
    BACKOFF = "backoff"
    PENDING = "pending"


ALARMS = (Kind.PAUSED, Kind.STOPPED, Kind.SILENT)


@dataclass(frozen=True)
class Notice:
    kind: Kind
    sentence: str


def notice_of(pool: Pool) -> Notice | None:
    """Why this pool starts nothing now, or has started something in vain; None: all is well."""
    if pool.stopped:
        told = "By an admin, or since somebody cancelled an allocation, it starts no workers"
        return Notice(Kind.STOPPED, f"{told}; `edif-hpc pool resume {pool.name}` lets it start some again.")
    if pool.deaths:
        sentence = f"{pool.deaths} workers in a row ended early, the latest: {pool.cause}"
        if not pool.paused:
            return Notice(Kind.BACKOFF, sentence)
        told = f"Paused; when that is mended, `edif-hpc pool resume {pool.name}` lets it try again. {sentence}"
        return Notice(Kind.PAUSED, told)
    if pool.trouble:
        return Notice(Kind.SILENT, f"Nothing is started until Slurm answers ({pool.trouble.rstrip('.')}).")
    if pool.pending:
        return Notice(Kind.PENDING, f"An allocation waits in Slurm ({pool.pending}).")
    return None


class Alerts:
    """Posts alarms to a webhook, in the background.

    Args:
        url: where to; empty: nowhere. It may hold a token, and is never logged.
        home: which service speaks.
    """

    def __init__(self, url: str, home: str) -> None:
        self.url = url
        self.home = home
        self._told: dict[str, Kind] = {}
        self._silent_since: dict[str, float] = {}
        self._posts: set[asyncio.Task[None]] = set()

    def look(self, notices: Mapping[str, Notice | None], now: float) -> None:
        """Tell of every pool's trouble that has begun since the last look, and forget what is over."""
        for pool, notice in notices.items():
            if notice is None or notice.kind is not Kind.SILENT:
                self._silent_since.pop(pool, None)
            if notice is None or notice.kind not in ALARMS:
                self._told.pop(pool, None)
                continue
            since = self._silent_since.setdefault(pool, now) if notice.kind is Kind.SILENT else 0.0
            if now - since >= SILENT_SECONDS and self._told.get(pool) is not notice.kind:
                self._told[pool] = notice.kind
                self._post(pool, notice)

    def _post(self, pool: str, notice: Notice) -> None:
        if not self.url:
            return
        said = {
            "service": self.home, "host": socket.gethostname(), "pool": pool, "kind": notice.kind.value,
            "text": f"edif_hpc, pool {pool}: {notice.sentence}", "time": datetime.now(UTC).isoformat(),
        }  # fmt: skip
        task = asyncio.create_task(self._send(said))
        self._posts.add(task)
        task.add_done_callback(self._posts.discard)

    async def _send(self, said: dict[str, str]) -> None:
        for pause in (*RETRY_SECONDS, None):
            try:
                async with httpx.AsyncClient(timeout=POST_SECONDS) as client:
                    answer = await client.post(self.url, json=said)
                if answer.is_success:
                    return
                error = f"status {answer.status_code}"
            except (httpx.HTTPError, httpx.InvalidURL) as failure:
                error = type(failure).__name__  # its words may hold the URL
            logger.warning("an alert was not taken", pool=said["pool"], kind=said["kind"], error=error)
            if pause is not None:
                await asyncio.sleep(pause)
