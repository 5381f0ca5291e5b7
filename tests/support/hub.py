"""A very small Hugging Face Hub on loopback: enough for huggingface_hub to look up and download one repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Serves `repos`: id -> (commit, {file name: bytes}); `gated` ids answer 401 with the Hub's own error code."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        for repo_id, (commit, files) in self.server.repos.items():
            if path.startswith(f"/api/models/{repo_id}"):
                return self._api(repo_id, commit, files, path.removeprefix(f"/api/models/{repo_id}"), body)
            if path.startswith(f"/{repo_id}/resolve/"):
                name = path.removeprefix(f"/{repo_id}/resolve/").partition("/")[2]
                return self._file(repo_id, commit, name, files.get(name), body)
        return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _api(self, repo_id: str, commit: str, files: dict[str, bytes], rest: str, body: bool) -> None:
        if repo_id in self.server.gated:
            return self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        kind, _, revision = rest.strip("/").partition("/")
        if revision.partition("/")[0] not in ("main", "v1", commit, ""):
            return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            listing = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
            return self._send(200, json.dumps(listing).encode(), body)
        siblings = [{"rfilename": name, "size": len(data), "blobId": _oid(data)} for name, data in files.items()]
        info = {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "private": False}
        return self._send(200, json.dumps({**info, "tags": [], "downloads": 0, "likes": 0}).encode(), body)

    def _file(self, repo_id: str, commit: str, name: str, data: bytes | None, body: bool) -> None:
        if data is None:
            return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        if name in self.server.broken and body:
            return self._send(500, b"", body)
        return self._send(200, data, body, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that is up; name it to a child process with HF_ENDPOINT."""
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
