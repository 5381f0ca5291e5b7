"""The account of a flight finds out a build that is broken: without it, that all is well would prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.stock import support
from tests.support.stack import client_of

from . import broken
from .conftest import gate_of
from .flight import Flight, packed
from .scene import given_up, gone, service, worker_of

ENOUGH_SECONDS = 20.0
"""Several times what a flight takes that loses its worker."""

FEW = 8


def test_no_token_check_is_found_out(tmp_path: Path, cache: Path, logits: torch.Tensor) -> None:
    with service(tmp_path / "home", cache, broken.without_token_check(tmp_path / "build")) as stack, client_of(stack):
        flight = Flight(stack, packed(support.tiny(), gate_of(stack), logits, FEW), gate_of(stack))
        (running, *_) = flight.when("RUNNING")
        with given_up(stack, running):
            flight.gate.touch()
        with pytest.raises(AssertionError, match="ended 2 times"):
            flight.land()


def test_no_reclaim_is_found_out(tmp_path: Path, cache: Path, logits: torch.Tensor) -> None:
    with service(tmp_path / "home", cache, broken.without_reclaim(tmp_path / "build")) as stack, client_of(stack):
        flight = Flight(stack, packed(support.tiny(), gate_of(stack), logits, FEW), gate_of(stack))
        (running, *_) = flight.when("RUNNING")
        gone(worker_of(stack))
        with pytest.raises(AssertionError, match=f"{running.client.accepted}: it is RUNNING"):
            flight.land(ENOUGH_SECONDS)
