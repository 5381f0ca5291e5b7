"""GET /result/{id}: a signed link's other end. Streams from Redis or the store, whole or by range, without a key.

Memory per download is two chunks, whatever the size of the result.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from edif_hpc.core import links, log
from edif_hpc.core.errors import LinkInvalid, NotYours
from edif_hpc.core.queue import Queue, keys
from edif_hpc.core.store import Store

from .stats import Stats

THREADS = 16
"""Downloads that read from the store at the same moment; others wait for their next chunk."""
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
GONE = "The result of this request has expired or never was; run it again."

logger = log.get("gateway")


class Results:
    def __init__(self, queue: Queue, store: Store, secret: str, stats: Stats) -> None:
        self.queue = queue
        self.store = store
        self.secret = secret
        self.stats = stats
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="download")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        self._check_link(request, request_id)
        request.scope["edif_notes"]["request"] = request_id
        found = await self.queue.redis.hget(keys.request(request_id), "data")
        data = json.loads(found) if found else {}
        object_key = data.get("object", "")
        inline = None if object_key else await self.queue.result(request_id)
        if not object_key and inline is None:
            raise NotYours(GONE)
        size = len(inline) if inline is not None else int(data["bytes"])
        headers = {"accept-ranges": "bytes", "etag": f'"{request_id}"', "cache-control": "private, no-store"}
        span = _span(request, size)
        if span is None:
            return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
        start, end = span or (0, size)
        if span:
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        headers["content-length"] = str(end - start)
        status, media = (206 if span else 200), "application/octet-stream"
        self.stats.downloads += 1
        self.stats.download_bytes += end - start
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=media)
        if inline is not None:
            return Response(inline[start:end], status, headers, media)
        chunks = await self._open(object_key, start, end)
        return StreamingResponse(self._stream(chunks), status, headers, media)

    def _check_link(self, request: Request, request_id: str) -> None:
        expires = request.query_params.get("expires", "")
        signature = request.query_params.get("signature", "")
        numeric = expires.isascii() and expires.isdigit() and len(expires) <= 12 and signature.isascii()
        if not numeric or not links.valid(self.secret, request_id, int(expires), signature):
            raise LinkInvalid(
                "This download link has expired or is not one of this service's; "
                f"ask for a fresh one with GET /response/{request_id[:64]}."
            )

    async def _open(self, object_key: str, start: int, end: int) -> Iterator[bytes]:
        loop = asyncio.get_running_loop()
        _, _, chunks = await loop.run_in_executor(
            self._threads, self.store.open, object_key, f"bytes={start}-{end - 1}" if end > start else None
        )
        return chunks

    async def _stream(self, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        try:
            while chunk := await loop.run_in_executor(self._threads, next, chunks, b""):
                yield chunk
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                self._threads.submit(close)


def _span(request: Request, size: int) -> tuple[int, int] | tuple[()] | None:
    """First byte and the one after the last; () for all, also when the header is no range; None when none exists."""
    match = RANGE.fullmatch(request.headers.get("range", ""))
    condition = request.headers.get("if-range")
    first, last = match.groups() if match else ("", "")
    if not (first or last) or (condition and condition != f'"{request.path_params["request_id"]}"'):
        return ()
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    if last and int(last) < int(first):
        return ()
    if int(first) >= size:
        return None
    return int(first), min(int(last) + 1, size) if last else size
