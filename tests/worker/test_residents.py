"""What a worker says of models that it could not load, and where it has room for one: on a device, or over several."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edif_hpc.core.errors import HostError, ModelError
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.settings import Settings
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.memory import GIB, weight_room
from edif_hpc.hardware.profiles import PROFILES
from edif_hpc.worker import residents
from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.residents import Resident, Residents, model_memory
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
    asyncio.run(found.load(KEY, {"cpu": 1}, lambda line: None))


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


# -- several devices --------------------------------------------------------------------------------------------------

LARGE = {"a.weight": ("BF16", [20 * GIB // 2])}
"""20 GiB of weights, of which the header alone is written."""
SMALL = {"a.weight": ("BF16", [4 * GIB // 2])}
DEVICES = {"cuda:0": 16 * GIB, "cuda:1": 16 * GIB, "cuda:2": 12 * GIB}


def key(name: str) -> ModelKey:
    return ModelKey(KEY.class_path, f"org/{name}", None, "text-generation")


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., Residents]:
    """A worker with a large and a small model in its cache, and three devices."""
    for name, tensors, config in (
        ("large", LARGE, CONFIG),
        ("packed", LARGE, {**CONFIG, "quantization_config": {"quant_method": "gptq"}}),
        ("small", SMALL, CONFIG),
        ("vast", {"a.weight": ("BF16", [40 * GIB // 2])}, CONFIG),
    ):
        sparse(entry(tmp_path / "hub", f"org/{name}", config=config) / "model.safetensors", tensors)

    def made(isolation: Isolation = Isolation.NONE, devices: dict[str, int] = DEVICES) -> Residents:
        return Residents(Settings(), tmp_path / "hub", tmp_path, dict(devices), "cuda", isolation)

    return made


def sparse(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file that is as large as it says and takes no room on the disk."""
    ((name, (kind, shape)),) = tensors.items()
    header = json.dumps({name: {"dtype": kind, "shape": shape, "data_offsets": [0, 2 * shape[0]]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * shape[0])


def holds(found: Residents, name: str, shares: dict[str, int], running: int = 0) -> Resident:
    resident = Resident(key(name), shares, state="ready", running=running)
    found.models[str(resident.key)] = resident
    return resident


def test_a_model_that_fits_one_device_stays_on_it(worker: Callable[..., Residents]) -> None:
    assert list(worker().room_for(key("small"), ())) == ["cuda:0"]


def test_a_larger_one_gets_as_many_devices_as_it_takes_and_has_them_to_itself(worker: Callable[..., Residents]) -> None:
    found = worker()
    assert found.room_for(key("large"), ()) == {"cuda:0": 16 * GIB, "cuda:1": 16 * GIB}
    holds(found, "large", {"cuda:0": 16 * GIB, "cuda:1": 16 * GIB})
    assert list(found.room_for(key("small"), ())) == ["cuda:2"]


def test_its_host_is_told_what_weights_each_device_takes(
    worker: Callable[..., Residents], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[HostSpec] = []

    class Listens(Host):
        reason = ""

        @classmethod
        async def start(cls, spec: Any, on_progress: Callable[[str], None]) -> Any:
            told.append(spec)
            return await super().start(spec, on_progress)

    monkeypatch.setattr(residents, "ModelHost", Listens)
    found = worker()
    room = found.room_for(key("large"), ())
    resident = asyncio.run(found.load(key("large"), room, lambda line: None))
    (spec,) = told
    assert (spec.device, spec.devices) == ("cuda:0", ("cuda:0", "cuda:1"))
    each = weight_room(16 * GIB, "cuda")
    assert spec.spread == {"cuda:0": each, "cuda:1": each}
    assert each * 1.1 + PROFILES["cuda"].runtime_bytes == pytest.approx(16 * GIB, abs=2)
    assert resident.memory_bytes == 32 * GIB
    asyncio.run(found.load(key("small"), found.room_for(key("small"), ()), lambda line: None))
    assert (told[1].device, told[1].spread) == ("cuda:2", {})


def test_those_on_its_devices_leave_and_nobody_else(worker: Callable[..., Residents]) -> None:
    found = worker()
    leaves = [holds(found, "small", {"cuda:0": GIB}), holds(found, "other", {"cuda:1": GIB})]
    stays = holds(found, "third", {"cuda:2": GIB})
    assert found.room_for(key("large"), ()) is None
    assert all(resident.retiring for resident in leaves)
    assert not stays.retiring
    assert found.room_for(key("large"), ()) is None
    found.models.clear()
    assert found.room_for(key("large"), ()) == {"cuda:0": 16 * GIB, "cuda:1": 16 * GIB}


def test_nobody_leaves_while_one_of_them_may_stay(worker: Callable[..., Residents]) -> None:
    found = worker()
    idle = holds(found, "small", {"cuda:0": GIB})
    busy = holds(found, "other", {"cuda:1": GIB}, running=1)
    busy.ready_since = time.monotonic()
    assert found.room_for(key("large"), ()) is None
    assert not idle.retiring
    assert not busy.retiring


def test_a_spread_one_that_is_idle_makes_room_for_a_small_one(worker: Callable[..., Residents]) -> None:
    found = worker()
    holds(found, "third", {"cuda:2": 12 * GIB}, running=1).ready_since = time.monotonic()
    large = holds(found, "large", {"cuda:0": 16 * GIB, "cuda:1": 16 * GIB})
    assert found.room_for(key("small"), ()) is None
    assert large.retiring


@pytest.mark.parametrize(
    ("name", "isolation", "devices", "sentence"),
    [
        ("large", Isolation.LOCKED, DEVICES, "It would fit over 2, but only workers at isolation none spread a model"),
        ("large", Isolation.PROCESS, DEVICES, "and this one is at process"),
        ("packed", Isolation.NONE, DEVICES, "It would fit over 2, but a quantised model stays on one"),
        ("vast", Isolation.NONE, DEVICES, "cuda:1 with 16.0 GiB and cuda:2 with 12.0 GiB; use a smaller"),
        ("large", Isolation.NONE, {"cuda:0": 16 * GIB}, "cuda:0 with 16.0 GiB; use a smaller model"),
        # Together they have what it needs on one, but each has its own costs besides.
        ("large", Isolation.NONE, {"cuda:0": 12 * GIB, "cuda:1": 12 * GIB}, "12.0 GiB; use a smaller model"),
    ],
)
def test_where_it_cannot_be_spread_it_is_refused_with_figures(
    worker: Callable[..., Residents], name: str, isolation: Isolation, devices: dict[str, int], sentence: str
) -> None:
    found = worker(isolation, devices)
    with pytest.raises(ModelError, match=r"needs about (23\.5|45\.5) GiB, and this worker has cuda:0") as refused:
        found.room_for(key(name), ())
    assert sentence in str(refused.value)


def test_what_one_model_may_have_is_the_sum_where_models_are_spread() -> None:
    assert model_memory(DEVICES, Isolation.NONE) == 44 * GIB
    assert model_memory(DEVICES, Isolation.LOCKED) == 16 * GIB
