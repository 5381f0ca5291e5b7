"""The table at level `none`: requests run in the model host itself: for one's own use, and these rows say why."""

from __future__ import annotations

from tests.isolation.every_level import EveryLevel


class TestNone(EveryLevel):
    level = "none"
