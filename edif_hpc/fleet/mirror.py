"""A mirror of Debian's as a build sees it: at an address of loopback that means nothing elsewhere.

Apptainer writes the address that an image is built from into its labels and its definition, where everybody who gets
the image reads it; a site's own mirror, with a password perhaps, is nobody's business. So what builds asks here, and
this asks the mirror, by this machine's own proxies.
"""

from __future__ import annotations

import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER_SECONDS = 60.0
PASSED_ON = ("Content-Type", "Content-Length", "Last-Modified")
BAD_GATEWAY = 502


@contextmanager
def through_loopback(mirror: str) -> Iterator[str]:
    """Where the mirror is reached until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, mirror.rstrip("/")))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="mirror", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/debian"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One question passed on, and its answer."""

    def __init__(self, mirror: str, *args: object) -> None:
        self.mirror = mirror
        super().__init__(*args)  # type: ignore[arg-type]  # the server's own: request, address, server

    def do_GET(self) -> None:
        path = self.path.removeprefix("/debian")
        asked = urllib.request.Request(self.mirror + path, method=self.command)  # noqa: S310 - an admin's own URL
        try:
            with urllib.request.urlopen(asked, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - the same URL
                self.send_response(answer.status)
                for name in PASSED_ON:
                    if value := answer.headers.get(name):
                        self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    shutil.copyfileobj(answer, self.wfile)
        except urllib.error.HTTPError as error:
            self.send_error(error.code)
        except (urllib.error.URLError, TimeoutError):
            self.send_error(BAD_GATEWAY)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        return
