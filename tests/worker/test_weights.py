"""One sealed copy of the weights: the same numbers from it for every architecture, and nobody can write to it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.core.errors import HostError
from edif_hpc.worker import device_weights, weights
from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.model import load
from tests.support import models

NAMES = ["gpt2", "llama", "qwen3", "gemma3", "mixtral", "t5", "bart", "qwen2.5-vl"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_CACHE, dict(os.environ)
    cache = models.build_cache(tmp_path_factory.mktemp("hf"), NAMES)
    models.offline_client(cache)
    yield cache
    constants.HF_HUB_CACHE = before[0]
    os.environ.clear()
    os.environ.update(before[1])


def spec(name: str, cache: Path, **more: Any) -> HostSpec:
    key = (
        "nnsight.modeling.transformers.TransformersModel:"
        f'{{"repo_id": "{models.repo_id(name)}", "revision": null, "task": "{models.task(name)}"}}'
    )
    return HostSpec(key, cache, cache, **more)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_shared_weights_gives_the_same_numbers(name: str, cache: Path) -> None:
    loaded = load(spec(name, cache), weights=True)
    expected = logits_of(name, loaded)
    count = sum(parameter.numel() for parameter in loaded._module.parameters())
    fds = weights.export(loaded)[:2]
    attached = load(spec(name, cache), weights=False)
    weights.attach(attached, *fds)
    assert torch.equal(logits_of(name, attached), expected)
    assert sum(parameter.numel() for parameter in attached._module.parameters()) == count  # ties are kept
    assert not any(tensor.is_meta for tensor in attached._module.state_dict().values())
    for fd in fds:
        os.close(fd)


def test_writes_stay_private_and_the_file_is_sealed(cache: Path) -> None:
    weights_fd, manifest_fd, size = weights.export(load(spec("gpt2", cache), weights=True))
    one, two = (load(spec("gpt2", cache), weights=False) for _ in range(2))
    for model in (one, two):
        weights.attach(model, weights_fd, manifest_fd)
    one._module.lm_head.weight.data.zero_()
    assert float(two._module.lm_head.weight.abs().sum()) > 0
    assert one._module.lm_head.weight is one._module.transformer.wte.weight
    with pytest.raises(PermissionError):
        os.pwrite(weights_fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(weights_fd, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(weights_fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE)
    os.close(weights_fd)
    os.close(manifest_fd)


def test_another_tree_is_refused(cache: Path) -> None:
    weights_fd, manifest_fd, _ = weights.export(load(spec("gpt2", cache), weights=True))
    with pytest.raises(HostError, match="isolation none"):
        weights.attach(load(spec("llama", cache), weights=False), weights_fd, manifest_fd)
    os.close(weights_fd)
    os.close(manifest_fd)


def test_the_checksum_notices_one_changed_number(cache: Path) -> None:
    model = load(spec("gpt2", cache), weights=True)
    checksum = device_weights.Checksum(model)
    assert checksum.intact()
    model._module.transformer.h[2].ln_1.bias.data[3] += 1e-6
    assert not checksum.intact()


ATTACH = """
import sys, torch
from tests.worker.test_weights import logits_of, spec
from edif_hpc.worker import device_weights
from edif_hpc.worker.model import load
from tests.support import models
name, cache, manifest, answer = sys.argv[1], models.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
models.offline_client(cache)
torch.set_num_threads(1)
model = load(spec(name, cache), weights=False)
device_weights.attach(model, manifest, "cpu")
torch.save(logits_of(name, model), answer)
model._module.get_input_embeddings().weight.data[7, 3] += 1
"""


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_way_of_a_devices_weights_on_shared_memory(name: str, cache: Path, tmp_path: Path) -> None:
    """Another process attaches what was exported and gets the same numbers; a write of its is noticed."""
    model = load(spec(name, cache), weights=True)
    torch.set_num_threads(1)
    expected = logits_of(name, model)
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        manifest, size = device_weights.export(model)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert size > 100_000
    checksum = device_weights.Checksum(model)
    answer = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", ATTACH, name, str(cache), str(manifest), str(answer)],
        pass_fds=[manifest], check=True, cwd=models.REPO,
    )  # fmt: skip
    os.close(manifest)
    assert torch.equal(torch.load(answer), expected)
    assert not checksum.intact()


def logits_of(name: str, model: Any) -> torch.Tensor:
    with model.trace(**models.sample(name, model)) as tracer:
        out = tracer.result.save()
    return out[0].detach()


def test_another_dtype(cache: Path) -> None:
    model = load(spec("gpt2", cache, dtype="bfloat16"), weights=True)
    weights_fd, manifest_fd, _ = weights.export(model)
    attached = load(spec("gpt2", cache, dtype="bfloat16"), weights=False)
    weights.attach(attached, weights_fd, manifest_fd)
    assert attached._module.lm_head.weight.dtype is torch.bfloat16
    os.close(weights_fd)
    os.close(manifest_fd)


def test_what_is_no_dtype_is_one_sentence(cache: Path) -> None:
    with pytest.raises(HostError, match="torch dtype"):
        load(spec("gpt2", cache, dtype="save"), weights=True)
