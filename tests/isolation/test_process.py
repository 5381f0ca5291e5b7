"""The table at level `process`: its own process bounds a request, and does not keep it from the user's world."""

from __future__ import annotations

from tests.isolation.every_level import EveryLevel


class TestProcess(EveryLevel):
    level = "process"
