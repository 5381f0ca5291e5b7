"""What a worker says of models that it could not load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edif_hpc.core.errors import HostError
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.settings import Settings
from edif_hpc.core.wire import ModelKey
from edif_hpc.worker import residents
from edif_hpc.worker.residents import Residents
from tests.support.cache_files import CONFIG, TENSORS, entry, tensors_bytes

pytestmark = pytest.mark.fast

KEY = ModelKey("nnsight.modeling.transformers.TransformersModel", "org/name", None, "text-generation")


class Host:
    """Stands for a process that loads: it fails as long as there is a reason."""

    reason = "The weights are damaged."

    @classmethod
    async def start(cls, spec: Any, on_progress: Callable[[str], None]) -> Any:
        if cls.reason:
            raise HostError(cls.reason)
        return SimpleNamespace(memory_bytes=1, pids=dict)


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Residents:
    """A worker's models after one load that failed."""
    (entry(tmp_path / "hub", config=CONFIG) / "model.safetensors").write_bytes(tensors_bytes(TENSORS))
    monkeypatch.setattr(residents, "ModelHost", type("Once", (Host,), {}))
    found = Residents(Settings(), tmp_path / "hub", tmp_path, {"cpu": 2**40}, "cpu", Isolation.NONE)
    with pytest.raises(HostError):
        load(found)
    return found


def load(found: Residents) -> None:
    asyncio.run(found.load(KEY, "cpu", lambda line: None))


def said(found: Residents) -> list[tuple[str, str]]:
    return [(record.state, record.error) for record in found.records()]


def test_a_failure_is_told(failed: Residents) -> None:
    assert said(failed) == [("failed", Host.reason)]


def test_a_failure_is_forgotten_after_a_while(failed: Residents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "FAILURE_SECONDS", 0.0)
    assert said(failed) == []
    assert not failed.failures


def test_a_load_that_succeeds_ends_it_at_once(failed: Residents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents.ModelHost, "reason", "")
    load(failed)
    assert said(failed) == [("ready", "")]
