"""Events as clients read them: JSON statuses, results in a binary frame, or a link for the address the client used."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.requests import HTTPConnection

from edif_hpc.core import links
from edif_hpc.core.queue import Event, Queue
from edif_hpc.core.store import Store, in_thread
from edif_hpc.core.wire import Status, binary_frame, status_message

from .peer import is_loopback

HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
GONE = "The result of this request has expired; run it again."


class Answers:
    def __init__(
        self, queue: Queue, store: Store, *, secret: str, public_url: str, link_seconds: float, presigned: bool
    ) -> None:
        self.queue = queue
        self.store = store
        self.secret = secret
        self.public_url = public_url
        self.link_seconds = link_seconds
        self.presigned = presigned

    def base_url(self, connection: HTTPConnection) -> str:
        """The address that this client used, as its links must name it.

        The link goes back to the very client that said the name, so a made-up Host harms only its author; what a
        proxy adds is believed from this machine alone.
        """
        if self.public_url:
            return self.public_url
        headers = connection.headers
        secure = connection.scope["scheme"] in ("https", "wss")
        host = headers.get("host", "")
        client = connection.scope.get("client")
        if client and is_loopback(client[0]):
            host = headers.get("x-forwarded-host", host).split(",")[0].strip()
            proto = headers.get("x-forwarded-proto", "").split(",")[0].strip()
            secure = proto == "https" if proto else secure
        if not HOST.fullmatch(host):
            server = connection.scope.get("server") or ("127.0.0.1", None)
            host = f"[{server[0]}]" if ":" in server[0] else server[0]
            host += f":{server[1]}" if server[1] else ""
        return f"{'https' if secure else 'http'}://{host}"

    async def link(self, request_id: str, data: dict[str, Any], base_url: str) -> str:
        """Where the client downloads this result, without a key."""
        if self.presigned and data.get("object"):
            return await in_thread(self.store.presign, data["object"], self.link_seconds)
        return links.make(self.secret, base_url, request_id, self.link_seconds)

    async def message(self, request_id: str, event: Event, base_url: str) -> dict[str, Any]:
        """One event as JSON. COMPLETED carries a link, never bytes."""
        data = None
        if event.status is Status.COMPLETED and event.data is not None:
            data = await self.link(request_id, event.data, base_url)
        return status_message(request_id, event.status.value, event.description, data, event.meta)

    async def frame(self, request_id: str, event: Event, base_url: str) -> str | bytes:
        """One event as a WebSocket frame: text, or one binary frame with a result that rides in Redis."""
        if event.status is Status.COMPLETED and event.data is not None and "object" not in event.data:
            result = event.result if event.result is not None else await self.queue.result(request_id)
            if result is None:
                return json.dumps(status_message(request_id, Status.ERROR, GONE))
            return binary_frame(request_id, result, event.meta, event.description)
        return json.dumps(await self.message(request_id, event, base_url))
