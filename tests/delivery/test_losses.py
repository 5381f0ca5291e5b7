"""Workers, executors and Redis go away in the middle of a request: it is answered once, or given up and says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support.servers import eventually
from tests.support.stack import Stack
from tests.worker.service import exists

from .scene import HEARTBEAT, completed, events, held, pids, post, process_of, reached, shown, small, worker

CANCEL_SECONDS = 1.0
"""Far below a heartbeat's: a bell tells the worker."""
CLAIM_SECONDS = 3 * HEARTBEAT


def test_a_cancelled_request_dies_at_once(stack: Stack, gpt2: Any, gate: Path) -> None:
    with worker(stack, "worker-a"):
        for _ in range(3):
            request_id = held(gpt2, gate)
            pid = process_of(stack, request_id)
            began = time.monotonic()
            assert post(stack, f"/api/requests/{request_id}/cancel")["outcome"] == "told"
            eventually(lambda pid=pid: not exists(pid), 30, "the executor's end", pause=0.002)
            took = time.monotonic() - began
            print(f"cancel: {took * 1000:.0f} ms")
            assert took < CANCEL_SECONDS
            assert reached(stack, request_id, "ERROR")["description"] == "Cancelled."
        completed(stack, small(gpt2))


def test_a_dead_workers_request_is_claimed_again_within_three_heartbeats(stack: Stack, gpt2: Any, gate: Path) -> None:
    with worker(stack, "worker-a") as first:
        request_id = held(gpt2, gate)
        process_of(stack, request_id)
        with worker(stack, "worker-b"):
            other = held(gpt2, gate)  # so that the second one holds the model too
            process_of(stack, other)
            assert shown(stack, other)["worker"] == "worker-b"
            post(stack, f"/api/requests/{other}/cancel")
            reached(stack, other, "ERROR")
            os.kill(first.pid, signal.SIGKILL)
            died = time.time()
            process_of(stack, request_id, 2)
            claims = [at for status, _, at in events(stack, request_id) if status == "DISPATCHED"]
            took = claims[1] - died
            print(f"claimed again: {took:.2f} s at a heartbeat of {HEARTBEAT:g} s")
            assert took < CLAIM_SECONDS + 0.5  # half a second for a crowded machine
            gate.touch()
            found = completed(stack, request_id)
            assert (found["attempt"], found["worker"]) == (2, "worker-b")
    assert any("worker-a stopped answering" in text for _, text, _ in events(stack, request_id))


def test_three_losses_without_an_explanation_are_given_up_and_can_be_tried_again(
    stack: Stack, gpt2: Any, gate: Path
) -> None:
    with worker(stack, "worker-a"):
        request_id = held(gpt2, gate)
        for attempt in range(1, 4):
            os.kill(process_of(stack, request_id, attempt), signal.SIGKILL)
        found = reached(stack, request_id, "ERROR")
        assert "killed from outside (signal 9)" in found["dead"]
        assert found["description"].startswith("Given up after 3 attempts")
        assert request_id in {row["id"] for row in stack.json("requests", "dead")}
        gate.touch()
        again = post(stack, f"/api/requests/{request_id}/retry")["id"]
        completed(stack, again)
    assert shown(stack, request_id)["repeated_by"] == again
    stack.cli("requests", "delete", request_id)
    assert request_id not in {row["id"] for row in stack.json("requests", "dead")}


def test_a_worker_keeps_its_result_while_redis_is_away_and_nothing_is_reclaimed(
    stack: Stack, gpt2: Any, gate: Path
) -> None:
    redis, log = pids(stack)["redis"], stack.home / "logs" / "worker-a.log"
    with worker(stack, "worker-a"):
        request_id = held(gpt2, gate)
        process_of(stack, request_id)
        os.kill(redis, signal.SIGSTOP)
        try:
            gate.touch()
            eventually(lambda: "waiting for the other side" in log.read_text(), 60, "the worker's wait")
            answer = httpx.get(f"{stack.url}/response/{request_id}", headers={"ndif-api-key": stack.key}, timeout=60)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        finally:
            os.kill(redis, signal.SIGCONT)
        assert completed(stack, request_id)["attempt"] == 1
        os.kill(redis, signal.SIGKILL)  # and one that is killed comes back with what it had
        eventually(lambda: answers(stack), 60, "the gateway's recovery")
        completed(stack, small(gpt2))
        assert shown(stack, request_id)["status"] == "COMPLETED"


def answers(stack: Stack) -> bool:
    return httpx.get(f"{stack.url}/api/requests", headers={"ndif-api-key": stack.key}, timeout=60).status_code == 200
