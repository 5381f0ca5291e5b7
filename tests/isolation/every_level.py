"""What is tested at every level. A module per level subclasses it, so that the levels run side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from tests.isolation import held
from tests.isolation.ground import Ground
from tests.isolation.table import Case, rows


@pytest.mark.timeout(240)
class EveryLevel:
    """The table, and what is true whatever is sent."""

    level: ClassVar[str]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", rows(self.level), ids=lambda case: case.name)

    def test_attack(self, case: Case, ground: Ground, model: Any, expected: torch.Tensor, another_user: str) -> None:
        held.hold(case, ground, model, expected, another_user)

    def test_nobody_unpickles_what_a_user_sent(self, ground: Ground, model: Any, expected: torch.Tensor) -> None:
        held.hold_the_pickles(ground, model)
        held.assert_honest(model, expected, self.level)

    def test_no_secret_in_arguments_or_environments(self, ground: Ground) -> None:
        held.hold_the_secrets(ground)

    def test_nobody_reads_anothers_request(self, ground: Ground, model: Any, another_user: str) -> None:
        held.hold_the_requests_apart(ground, model, another_user)
