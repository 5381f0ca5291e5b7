"""`down` with requests waiting and running: nothing accepted is forgotten by the next `up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.servers import eventually
from tests.support.stack import Stack

from .scene import completed, events, held, pids, process_of, shown, small, worker


def test_what_waits_and_what_runs_is_served_after_the_next_up(stack: Stack, gpt2: Any, gate: Path) -> None:
    with worker(stack, "worker-a") as first:
        running = held(gpt2, gate)
        process_of(stack, running)
        waiting = [small(gpt2) for _ in range(3)]
        stack.cli("down")
        assert first.wait(10) == 0
    assert pids(stack) == {}
    stack.cli("up", "--detach", "--isolation", "process")
    waits = {"QUEUED", "PROVISIONING"}  # the latter as soon as the fleet has told them that no worker is there
    assert {shown(stack, request_id)["status"] for request_id in (running, *waiting)} <= waits
    gate.touch()
    with worker(stack, "worker-b"):
        for request_id in (running, *waiting):
            completed(stack, request_id)
    assert any(text == "Back in the queue: its worker is ending." for _, text, _ in events(stack, running))
    eventually(lambda: "worker-b" not in pids(stack), 30, "the worker's end")
