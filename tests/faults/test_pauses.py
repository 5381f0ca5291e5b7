"""Each component stands still for twenty seconds, far longer than a lease, and goes on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.delivery.scene import PATIENCE, pids
from tests.support.stack import Stack

from .flight import Flight, Sent
from .scene import executor_of, host_of, paused, worker_of

pytestmark = pytest.mark.long

PAUSE_SECONDS = 20.0
PROCESSES: dict[str, Callable[[Stack, Sent], int]] = {
    "gateway": lambda stack, running: pids(stack)["gateway"],
    "fleet": lambda stack, running: pids(stack)["fleet"],
    "Redis": lambda stack, running: pids(stack)["redis"],
    "object store": lambda stack, running: pids(stack)["store"],
    "worker": lambda stack, running: worker_of(stack),
    "model host": lambda stack, running: host_of(stack),
    "executor": executor_of,
}


@pytest.mark.parametrize("component", PROCESSES)
def test_twenty_seconds_without(flight: Flight, stack: Stack, component: str) -> None:
    """SIGSTOP for 20 s with 40 requests in flight"""
    (running, *_) = flight.when("RUNNING")
    with paused(PROCESSES[component](stack, running)):
        flight.gate.touch()
        time.sleep(PAUSE_SECONDS)
    flight.land(2 * PATIENCE)
