"""The table at level `none`: requests run in the model host itself: for one's own use, and these rows say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.isolation import held
from tests.isolation.ground import Ground
from tests.isolation.table import Case, rows

LEVEL = "none"
pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("case", rows(LEVEL), ids=lambda case: case.name)
def test_attack(case: Case, ground: Ground, model: Any, expected: torch.Tensor, another_user: str) -> None:
    held.hold(case, ground, model, expected, another_user)


def test_nobody_unpickles_what_a_user_sent(ground: Ground, model: Any, expected: torch.Tensor) -> None:
    held.hold_the_pickles(ground, model)
    held.assert_honest(model, expected, LEVEL)


def test_no_secret_in_arguments_or_environments(ground: Ground) -> None:
    held.hold_the_secrets(ground)


def test_nobody_reads_anothers_request(ground: Ground, model: Any, another_user: str) -> None:
    held.hold_the_requests_apart(ground, model, another_user)
