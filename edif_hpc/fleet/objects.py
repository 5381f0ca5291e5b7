"""What lies in the object store and nobody needs any more: objects that are due, and uploads whose worker was killed.

In a loop of its own: a store that is away, or answers slowly, must not keep the fleet from looking after the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from edif_hpc.core import log
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.queue import Queue
from edif_hpc.core.store import PAYLOADS, Store, Upload, attempt_of, in_daemon

DELETE_SECONDS = 10.0
UPLOADS_SECONDS = 60.0
STORE_PAUSE_SECONDS = 30.0
BATCH = 1000
PAYLOAD_SECONDS = 3600.0
"""An unfinished upload of a payload is somebody's who waits for an answer: none takes this long."""

logger = log.get("fleet")


class Objects:
    """Deletes and aborts while `leads` says that this fleet is the leader."""

    def __init__(self, queue: Queue, store: Store, leads: Callable[[], bool]) -> None:
        self.queue = queue
        self.store = store
        self.leads = leads
        self._uploads_due = 0.0

    async def run(self) -> None:
        """For ever. Redis and the store may go away at any time."""
        while True:
            pause = DELETE_SECONDS
            try:
                if self.leads():
                    await self.delete_due()
                    await self.abort_abandoned()
            except Unavailable as error:
                logger.warning("the store is away", error=str(error))
                pause = STORE_PAUSE_SECONDS
            except (RedisError, OSError) as error:
                logger.warning("redis is away", error=str(error))
            await asyncio.sleep(pause)

    async def delete_due(self) -> None:
        """Delete what is due, all of it.

        Raises:
            Unavailable: the store is away; what is left stays due.
        """
        while due := await self.queue.due_objects(time.time(), BATCH):
            await in_daemon(self.store.delete, due)
            await self.queue.forget_objects(due)
            logger.info("objects deleted", count=len(due))

    async def abort_abandoned(self) -> None:
        """Abort uploads in parts whose attempt is over: what a killed worker sent would be kept, and never seen.

        Raises:
            Unavailable: the store is away.
        """
        if time.monotonic() < self._uploads_due:
            return
        self._uploads_due = time.monotonic() + UPLOADS_SECONDS
        found = await in_daemon(self.store.uploads)
        abandoned = [upload for upload in found if await self._is_abandoned(upload)]
        if abandoned:
            await in_daemon(self.store.abort, abandoned)
            logger.info("uploads aborted", count=len(abandoned))

    async def _is_abandoned(self, upload: Upload) -> bool:
        if upload.key.startswith(PAYLOADS):
            return time.time() - upload.began > PAYLOAD_SECONDS
        attempt = attempt_of(upload.key)
        return attempt is not None and not await self.queue.is_current(*attempt)
