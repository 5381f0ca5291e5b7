"""One tiny model, and one host per isolation level and module."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker import sandbox
from edif_hpc.worker.contract import HostSpec
from tests.support import device, models
from tests.worker.service import Caught, Service, exists, scratch

ADAPTER = "edif-test/gpt2-lora"


@pytest.fixture(scope="session")
def hub() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="edif-test-hub-"))
    root.chmod(0o755)
    cache = models.build_cache(root, ["gpt2", "gpt2-lora"])
    models.offline_client(cache)
    yield cache
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def adapter(hub: Path) -> Path:
    return next((hub / "models--edif-test--gpt2-lora" / "snapshots").iterdir())


@pytest.fixture(scope="session")
def model(hub: Path) -> Any:
    """The client's: on meta, and dispatched when a test runs something locally, with as many threads as the hosts."""
    import torch
    from nnsight import TransformersModel

    torch.set_num_threads(1)
    return TransformersModel(models.repo_id("gpt2"), task="text-generation", **device.local())


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def caught() -> Caught:
    return Caught()


def spec_of(model: Any, hub: Path, adapter: Path, level: Isolation, **more: Any) -> HostSpec:
    options = {"isolation": level, "required": level, "adapters": {ADAPTER: str(adapter)}, "device": device.first()}
    return HostSpec(model.to_model_key(), hub, scratch(), **(options | more))


@pytest.fixture(scope="module", params=list(Isolation), ids=str)
def service(
    request: pytest.FixtureRequest, loop: asyncio.AbstractEventLoop, model: Any, hub: Path, adapter: Path
) -> Iterator[Service]:
    level = request.param
    if not sandbox.probe().level.covers(level):
        pytest.skip(f"this machine does not reach {level}")
    service = Service(loop, spec_of(model, hub, adapter, level))
    yield service
    pids = service.host.pids().values()
    service.close()
    assert not [pid for pid in pids if exists(pid)]
    shutil.rmtree(service.spec.scratch)


@pytest.fixture(scope="module")
def isolated(service: Service) -> Service:
    if service.level is Isolation.NONE:
        pytest.skip("level none runs requests in the host itself")
    return service
