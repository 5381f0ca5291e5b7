"""A service of one finished request, for what a real one does only by mishap: wrong bytes, and links that are refused.

It speaks the part of the service's HTTP that a download uses, checksums included, and counts the bytes it gives out.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REQUEST = "0" * 32


class Far:
    """What is there and how it is given out. Made by `far`.

    Attributes:
        corrupt: how many answers still carry a wrong byte.
        refused_links: how many links still turn out to have expired.
        ranges: whether ranges are honoured; some proxies drop their header.
        given: bytes of results that were sent.
    """

    def __init__(self, content: bytes, part_bytes: int) -> None:
        self.content = content
        self.part_bytes = part_bytes
        self.corrupt = 0
        self.refused_links = 0
        self.ranges = True
        self.given = 0
        self.links = 0
        self.url = ""
        self.lock = threading.Lock()

    def record(self) -> dict[str, object]:
        parts = [self.content[at : at + self.part_bytes] for at in range(0, len(self.content), self.part_bytes)]
        digests = [hashlib.sha256(part).hexdigest() for part in parts]
        self.links += 1
        return {
            "id": REQUEST,
            "status": "COMPLETED",
            "result": f"{self.url}/result?link={self.links}",
            "result_bytes": len(self.content),
            "transfer": {
                "bytes": len(self.content),
                "format": "plain",
                "part_bytes": self.part_bytes,
                "digests": digests,
            },
        }

    def events(self) -> dict[str, object]:
        completed = {"cursor": "1-0", "at": 1.0, "id": REQUEST, "status": "COMPLETED", "description": "", "meta": {}}
        return {"events": [completed], "terminal": True}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    far: Far

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/result":
            self._result()
        else:
            self._send(200, json.dumps(self.far.events() if path.endswith("/events") else self.far.record()).encode())

    def _result(self) -> None:
        far = self.far
        with far.lock:
            if far.refused_links:
                far.refused_links -= 1
                self._send(403, b"{}")
                return
            wrong, far.corrupt = bool(far.corrupt), max(0, far.corrupt - 1)
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")) if far.ranges else None
        start, end = (int(span[1]), int(span[2]) + 1) if span else (0, len(far.content))
        body = far.content[start:end]
        if wrong:
            body = body[:-1] + bytes([body[-1] ^ 1])
        with far.lock:
            far.given += len(body)
        self._send(206 if span else 200, body)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving(content: bytes, part_bytes: int) -> Iterator[Far]:
    there = Far(content, part_bytes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"far": there}))
    server.daemon_threads = True
    there.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
