"""What people are told of pools, and the webhook, which is a real HTTP server here."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from edif_hpc.fleet import notices
from edif_hpc.fleet.decide import PROCESSES, Pool
from edif_hpc.fleet.notices import SILENT_SECONDS, Alerts, Kind, Notice, notice_of

pytestmark = pytest.mark.fast

PAUSED = Notice(Kind.PAUSED, "3 workers in a row ended early, the latest: no image")
NOW = 1000.0


class Hook:
    """A webhook. It answers with the next of `answers`, and with 200 after them."""

    def __init__(self) -> None:
        self.heard: list[dict[str, str]] = []
        self.answers: list[int] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(hook.answers.pop(0) if hook.answers else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-token"


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def watched(hook: Hook, *looks: tuple[dict[str, Notice | None], float], expected: int) -> list[dict[str, str]]:
    """What the hook heard after these looks."""

    async def run() -> None:
        alerts = Alerts(hook.url, "/home/ann/edif")
        for found, now in looks:
            alerts.look(found, now)
        async with asyncio.timeout(10):
            while len(hook.heard) < expected or alerts._posts:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    return hook.heard


@pytest.mark.parametrize(
    ("pool", "kind", "words"),
    [
        (Pool("p", 1, stopped=True), Kind.STOPPED, "edif-hpc pool resume p"),
        (Pool("p", 1, trouble="squeue failed."), Kind.SILENT, "until Slurm answers (squeue failed)"),
        (
            Pool("p", 1, deaths=1, cause="no image"),
            Kind.BACKOFF,
            "1 workers in a row ended early, the latest: no image",
        ),
        (Pool("p", 1, deaths=1, cause="Invalid partition", trouble="squeue failed"), Kind.BACKOFF, "Invalid partition"),
        (Pool("p", 1, deaths=len(PROCESSES.backoff_seconds) + 1), Kind.PAUSED, "ended early"),
        (Pool("p", 1, pending="Priority"), Kind.PENDING, "waits in Slurm (Priority)"),
    ],
)
def test_a_pool_that_starts_nothing_says_why(pool: Pool, kind: Kind, words: str) -> None:
    notice = notice_of(pool)
    assert notice
    assert notice.kind is kind
    assert words in notice.sentence


def test_a_pool_that_is_well_says_nothing() -> None:
    assert notice_of(Pool("p", 1)) is None


def test_the_webhook_hears_of_a_trouble_once_and_again_when_it_comes_back(hook: Hook) -> None:
    on, off = {"p": PAUSED}, {"p": None}
    heard = watched(hook, (on, NOW), (on, NOW + 1), (off, NOW + 2), (on, NOW + 3), expected=2)
    assert len(heard) == 2
    assert heard[0]["pool"] == "p"
    assert heard[0]["kind"] == "paused"
    assert "no image" in heard[0]["text"]


def test_what_is_nobodys_business_is_not_posted_and_a_short_silence_neither(hook: Hook) -> None:
    quiet = {"p": Notice(Kind.SILENT, "squeue failed")}
    busy = {"p": Notice(Kind.PENDING, "Priority")}
    looks = [(busy, NOW), (quiet, NOW), (quiet, NOW + SILENT_SECONDS - 1), (busy, NOW + 500), (quiet, NOW + 501)]
    assert watched(hook, *looks, (quiet, NOW + 501 + SILENT_SECONDS), expected=1)[0]["kind"] == "silent"


def test_a_webhook_that_refuses_is_tried_again_and_its_address_is_not_logged(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "RETRY_SECONDS", (0.01, 0.01))
    hook.answers = [500, 503]
    assert len(watched(hook, ({"p": PAUSED}, NOW), expected=3)) == 3
    said: Callable[[], object] = capsys.readouterr
    assert "secret-token" not in str(said())


def test_without_an_address_nothing_is_posted() -> None:
    alerts = Alerts("", "/home")
    alerts.look({"p": PAUSED}, NOW)
    assert not alerts._posts
