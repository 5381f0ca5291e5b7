"""The table at level `locked`: and nothing outside can be reached either."""

from __future__ import annotations

from tests.isolation.every_level import EveryLevel


class TestLocked(EveryLevel):
    level = "locked"
