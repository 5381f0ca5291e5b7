"""How large a model may be is a matter of the workers there could be, not of the machine the gateway runs on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.core.pools import Pool
from edif_hpc.core.registry import WorkerRecord
from edif_hpc.core.settings import ModelSettings, Settings
from edif_hpc.core.target import Target
from edif_hpc.core.wire import ModelKey
from edif_hpc.gateway.door import MEMORY_SHARE, Door
from tests.support.cache_files import CONFIG, TENSORS, entry, tensors_bytes

pytestmark = pytest.mark.fast

KEY = ModelKey.parse('nnsight.modeling.transformers.TransformersModel:{"repo_id": "org/model", "revision": null}')


class NobodyYet:
    """A service before its first worker."""

    async def workers(self) -> list[Any]:
        return []


def largest(*pools: Pool) -> int:
    settings = Settings(pool=list(pools))
    door = Door(settings, Path("/nowhere"), NobodyYet())  # type: ignore[arg-type]  # all that is asked of it here
    return asyncio.run(door._largest())


def test_a_pool_of_cpus_has_the_memory_it_asks_for() -> None:
    assert largest(Pool(name="cpu", memory="1024G")) == int(1024 * 1024**3 * MEMORY_SHARE)


def test_a_pool_whose_memory_only_its_workers_know_refuses_nobody_early() -> None:
    assert largest(Pool(name="gpu", accelerator="cuda", gpus=1), Pool(name="cpu", memory="8G")) == sys.maxsize


def test_where_models_are_spread_only_a_worker_knows_over_how_much() -> None:
    limits = {"isolation": "none", "memory_bytes": 2**30}
    pool = Pool(name="gpu", accelerator="cuda", gpus=4)
    for worker, expected in ((limits, sys.maxsize), ({**limits, "isolation": "locked"}, 2**30)):
        door = Door(Settings(pool=[pool], worker=worker), Path("/nowhere"), NobodyYet())  # type: ignore[arg-type]  # see above
        assert asyncio.run(door._largest()) == expected


def test_a_worker_tells_what_one_model_may_have_there() -> None:
    class Observed(NobodyYet):
        async def workers(self) -> list[Any]:
            spread = {"memory_budget": 2**60, "model_memory": 2**60 - 1}
            return [WorkerRecord(worker_id="one", version="", host="", pid=1, started=0.0, **spread)]

    door = Door(Settings(), Path("/nowhere"), Observed())  # type: ignore[arg-type]  # all that is asked of it here
    assert asyncio.run(door._largest()) == 2**60 - 1


def test_without_pools_this_machine_is_the_measure() -> None:
    assert 0 < largest() < sys.maxsize


@pytest.mark.parametrize(
    ("seconds", "refused"), [(0.0, False), (7000.0, False), (7200.0, True), (100_000.0, True)]
)  # fmt: skip
def test_what_fits_no_allocation_is_refused_with_the_time_that_would(seconds: float, refused: bool) -> None:
    pools = [Pool(name="short", time="01:00:00"), Pool(name="long", time="02:00:00", models=["org/*"])]
    door = Door(Settings(pool=pools), Path("/nowhere"), NobodyYet())  # type: ignore[arg-type]  # not asked of it here
    said = asyncio.run(door.refusal(Target.of([KEY]), {}, seconds))
    assert ("leaves 7140 s for a run" in said) is refused


def test_processes_without_an_end_take_whatever_time() -> None:
    pools = [Pool(name="short", time="01:00:00"), Pool(name="desk", launcher="local")]
    door = Door(Settings(pool=pools), Path("/nowhere"), NobodyYet())  # type: ignore[arg-type]  # not asked of it here
    assert "for a run" not in asyncio.run(door.refusal(Target.of([KEY]), {}, 1e6))


@pytest.mark.parametrize(("ranks", "says"), [(1, ""), (2, ""), (4, "divide by 2;"), (3, "divide by 2;")])
def test_a_model_that_cannot_be_split_so_is_refused_with_what_works(tmp_path: Path, ranks: int, says: str) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    snapshot = entry(tmp_path, "org/model", config={**CONFIG, **sizes})
    (snapshot / "model.safetensors").write_bytes(tensors_bytes(TENSORS))
    settings = Settings(models=ModelSettings(tensor_parallel=ranks))
    door = Door(settings, tmp_path, NobodyYet())  # type: ignore[arg-type]  # all that is asked of it here
    said = asyncio.run(door.refusal(Target.of([KEY]), {}))
    assert says in said
    assert bool(said) is bool(says)
