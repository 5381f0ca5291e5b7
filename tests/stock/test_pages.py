"""What nnsight asks a service beside requests: status, is_model_running, compare, whoami, ping."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import nnsight
import pytest

from tests.support import models
from tests.support.models import REPO
from tests.support.servers import eventually
from tests.support.stack import Stack

from .support import key_of, works

ASK = """
import json, sys
import nnsight
name = sys.argv[1]
print(json.dumps({
    "running": nnsight.is_model_running(name),
    "with_task": nnsight.is_model_running(name, task="text-generation"),
    "another_task": nnsight.is_model_running(name, task="feature-extraction"),
    "another_revision": nnsight.is_model_running(name, revision="other"),
    "another": nnsight.is_model_running("edif-test/never-loaded"),
    "status": name in nnsight.status(),
}))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `is_model_running` asks: the id of a model."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        body = json.dumps({"id": name, "modelId": name, "siblings": [], "tags": []}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def serves(model: Any) -> None:
    """A request has run, and the pages, which are some seconds behind, say so."""
    works(model)
    eventually(lambda: nnsight.status().status.value == "UP", what="the status being UP")


def test_status(stack: Stack, gpt2: Any) -> None:
    serves(gpt2)
    status = nnsight.status()
    assert status.status.value == "UP"
    found = status[models.repo_id("gpt2")]
    assert found["state"] == "RUNNING"
    assert found["level"] == "HOT"
    assert found["task"] == "text-generation"
    assert "gpt2" in str(status)
    raw = nnsight.status(raw=True)["deployments"]
    assert any(entry["repo_id"] == models.repo_id("gpt2") for entry in raw.values())


def test_is_model_running(stack: Stack, gpt2: Any, hub: str) -> None:
    """It asks the Hub for the model's canonical name, so this client must not be offline."""
    serves(gpt2)
    environment = {"NDIF_HOST": stack.url, "NDIF_API_KEY": stack.key, "HF_ENDPOINT": hub}
    done = subprocess.run(
        [sys.executable, "-c", ASK, models.repo_id("gpt2")],
        env=stack.environment(**environment), cwd=REPO, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "running": True,
        "with_task": True,
        "another_task": False,
        "another_revision": False,
        "another": False,
        "status": True,
    }


def test_compare(stack: Stack, gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsight.ndif._REMOTE_ENV", None)
    works(gpt2)
    found = nnsight.compare()
    assert found.python_matches
    assert found.critical_mismatches == {}
    assert found.packages["torch"]["match"]
    assert found.packages["nnsight"]["match"]


def test_whoami(stack: Stack) -> None:
    assert nnsight.ndif.whoami()["email"] == "tester"
    assert nnsight.ndif.whoami(key_of(stack, "second"))["email"] == "second"
    unknown = nnsight.ndif.whoami("edif_unknown")
    assert unknown["email"] is None
    assert unknown["tags"] == []


def test_ping(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/ping").json() == "pong"
