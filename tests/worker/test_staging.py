"""Weights that are read ahead or copied to the scratch: the same numbers, nothing half, and nothing left behind."""

# A block's variables are what it saves: ruff cannot know that they are used.
# ruff: noqa: F841

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.registry import Registry
from edif_hpc.core.settings import Settings
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.checkpoint import describe
from edif_hpc.worker import staging
from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.residents import Residents
from edif_hpc.worker.staging import COPIES, Staging
from tests.support import models
from tests.support.cache_files import COMMIT, CONFIG, TENSORS, entry, tensors_bytes
from tests.support.servers import eventually, redis_server
from tests.worker.service import PROMPT, Caught, Service, scratch
from tests.worker.started import prepared, worker

KEY = ModelKey("nnsight.modeling.transformers.TransformersModel", "org/name", None, "text-generation")


def sharded(hub: Path, source: Path, repo_id: str) -> Path:
    """Lay a model as the Hub's client does, its weights in several files; the snapshot."""
    from transformers import AutoModelForCausalLM

    snapshot = entry(hub, repo_id)
    parts = hub.parent / "parts"
    shutil.copytree(source, parts)
    (parts / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(parts, max_shard_size="200KB")
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for path in parts.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    assert len(list(snapshot.glob("model-*.safetensors"))) > 2
    return snapshot


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with one tiny entry, its weights a link to a blob."""
    blob = tmp_path / "blob"
    blob.write_bytes(tensors_bytes(TENSORS))
    (entry(tmp_path / "hub", config=CONFIG) / "model.safetensors").symlink_to(blob)
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def bring(found: Staging, key: ModelKey = KEY, in_use: tuple[str, ...] = ()) -> Path:
    return asyncio.run(found.bring(key, in_use))


@pytest.mark.parametrize("level", [Isolation.NONE, Isolation.PROCESS], ids=str)
def test_a_model_gives_the_same_numbers_however_its_weights_came(
    loop: asyncio.AbstractEventLoop,
    tmp_path: Path,
    folder: Path,
    model: Any,
    hub: Path,
    caught: Caught,
    level: Isolation,
) -> None:
    source = describe(hub, models.repo_id("gpt2")).path
    snapshot = sharded(tmp_path / "hub", source, models.repo_id("gpt2"))
    with model.trace(PROMPT, backend=caught):
        logits = model.lm_head.output.save()
    seen = {}
    for how in ("read", "prefetch", "stage"):
        found = Staging(how, tmp_path / "hub", folder)
        key = ModelKey.parse(model.to_model_key())
        near = loop.run_until_complete(found.bring(key, ()))
        assert near == (folder / COPIES if how == "stage" else tmp_path / "hub")
        service = Service(loop, HostSpec(str(key), near, scratch(), level, level))
        seen[how] = service.saves(caught)["logits"]
        service.close()
        shutil.rmtree(service.spec.scratch)
    assert torch.equal(seen["read"], seen["prefetch"])
    assert torch.equal(seen["read"], seen["stage"])
    copies = folder / COPIES / snapshot.relative_to(tmp_path / "hub")
    names = {path.name for path in copies.iterdir() if not path.is_symlink()}
    assert names == {path.name for path in snapshot.glob("*.safetensors")}


def test_a_second_host_loads_the_copy_that_the_first_made(
    loop: asyncio.AbstractEventLoop, tmp_path: Path, folder: Path, model: Any, caught: Caught
) -> None:
    cache = models.build_cache(tmp_path, ["gpt2"])
    with model.trace(PROMPT, backend=caught):
        logits = model.lm_head.output.save()
    settings = Settings(models={"weights": "stage"}, worker={"spares": 0})
    found = Residents(settings, cache, folder, {"cpu": 2**34}, "cpu", Isolation.NONE)
    key = ModelKey.parse(model.to_model_key())
    seen = []
    for _ in range(2):
        resident = loop.run_until_complete(found.load(key, {"cpu": 2**30}, lambda step: None))
        assert resident.host
        service = Service(loop, HostSpec(str(key), cache, folder, Isolation.NONE), resident.host)
        seen.append(service.saves(caught)["logits"])
        loop.run_until_complete(found.close())
        blob = describe(cache, key.repo_id).path.joinpath("model.safetensors").resolve()
        before = blob.stat()
        with blob.open("r+b") as file:  # whoever read these again would see other numbers
            file.seek(before.st_size // 2)
            file.write(bytes(before.st_size // 4))
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(*seen)


@pytest.mark.fast
def test_a_copy_is_an_ordinary_cache_whose_small_files_are_links(cache: Path, folder: Path) -> None:
    (cache / "models--other--one").mkdir()
    near = bring(Staging("stage", cache, folder))
    found = describe(near, "org/name")
    assert found == replace(describe(cache, "org/name"), path=found.path)
    assert (found.path / "model.safetensors").is_file()
    assert not (found.path / "model.safetensors").is_symlink()
    assert (found.path / "config.json").is_symlink()
    assert (near / "models--other--one").resolve() == (cache / "models--other--one").resolve()


@pytest.mark.fast
@pytest.mark.parametrize("revision", ["refs/pr/1", COMMIT])
def test_a_revision_is_found_in_the_copy_by_its_name(cache: Path, folder: Path, revision: str) -> None:
    ref = cache / "models--org--name" / "refs" / "refs" / "pr" / "1"
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMIT)
    near = bring(Staging("stage", cache, folder), replace(KEY, revision=revision))
    assert describe(near, "org/name", revision).commit == COMMIT


@pytest.mark.fast
def test_what_was_pulled_anew_is_copied_anew_and_what_was_not_is_not(cache: Path, folder: Path) -> None:
    found = Staging("stage", cache, folder)
    weights = describe(bring(found), "org/name").path / "model.safetensors"
    first = weights.stat()
    bring(found)
    assert weights.stat().st_ino == first.st_ino
    source = (cache.parent / "blob").read_bytes()
    (cache.parent / "blob").write_bytes(source[:-1] + b"x")
    bring(found)
    assert weights.read_bytes().endswith(b"x")


@pytest.mark.fast
def test_a_full_folder_is_said_and_the_model_is_read_where_it_is(
    cache: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (cache.parent / "blob").stat().st_size
    with largest_file(size // 2):
        assert bring(Staging("stage", cache, folder)) == cache
    said = capsys.readouterr().out
    assert "could not be copied" in said
    assert "File too large" in said
    assert "TMPDIR" in said
    assert not list((folder / COPIES).rglob("*.safetensors"))


@pytest.mark.fast
def test_what_has_no_room_is_not_begun(cache: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_file_system(folder):
        assert bring(Staging("stage", cache, folder)) == cache
        assert "stay for requests" in capsys.readouterr().out
        assert not list((folder / COPIES).iterdir())


@pytest.mark.fast
def test_copies_that_nobody_uses_make_room(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SPARE_BYTES", 0)
    other = replace(KEY, repo_id="org/other")
    for path in (cache.parent / "blob", entry(cache, "org/other", CONFIG) / "model.safetensors"):
        path.write_bytes(tensors_bytes({"a.weight": ("BF16", [300 * 1024])}))
    with small_file_system(folder):
        found = Staging("stage", cache, folder)
        first = describe(bring(found), "org/name").path
        assert bring(found, other, in_use=(str(KEY),)) == cache, "the first is in use"
        assert first.exists()
        assert bring(found, other) == folder / COPIES
        assert (folder / COPIES / "models--org--name").is_symlink()


@pytest.mark.fast
def test_who_waits_is_told_how_far_it_is_and_a_cancelled_copy_is_gone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "FIRST_WORD_SECONDS", 0.0)
    elements = 2**30
    weights = entry(tmp_path / "hub", config=CONFIG) / "model.safetensors"
    weights.write_bytes(tensors_bytes({"a.weight": ("BF16", [0])}))
    header = (
        weights.read_bytes()[8:].replace(b"[0]", b"[%d]" % elements).replace(b"[0, 0]", b"[0, %d]" % (2 * elements))
    )
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(weights, 8 + len(header) + 2 * elements)
    told: list[str] = []

    async def tell(sentence: str) -> None:
        told.append(sentence)

    async def cancelled() -> None:
        copying = asyncio.create_task(Staging("stage", tmp_path / "hub", folder).bring(KEY, (), tell))
        while not told:
            await asyncio.sleep(0)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying

    asyncio.run(cancelled())
    assert told[0].startswith("Copying the weights of org/name to its node: 0.")
    assert told[0].endswith(" of 2.0 GiB.")
    assert not list((folder / COPIES).rglob("*.safetensors"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_nothing_is_left_of_a_worker_that_ended(tmp_path: Path, model: Any, end: signal.Signals) -> None:
    temporary, redis_folder = tmp_path / "tmp", tmp_path / "redis"
    temporary.mkdir()
    redis_folder.mkdir()
    cache = models.build_cache(tmp_path, ["gpt2"])

    def copies() -> list[Path]:
        return [path for path in temporary.rglob("model.safetensors") if not path.is_symlink()]

    with redis_server(redis_folder) as redis:
        home = prepared(tmp_path / "home", redis, f'cache = "{cache}"\nweights = "stage"\n')

        def ready(name: str, command: str = "") -> bool:
            async def ask() -> bool:
                async with redis.client() as client:
                    registry = Registry(client)
                    found = await registry.worker(name)
                    if found and command and not found.models:
                        await registry.command(name, command)
                    return bool(found and (not command or any(each.state == "ready" for each in found.models)))

            return asyncio.run(ask())

        with worker(home, temporary, "first") as first:
            eventually(lambda: ready("first", f"load {model.to_model_key()}"), 120.0, "a model")
            assert len(copies()) == 1
            first.send_signal(end)
            first.wait(60)
        assert len(copies()) == (end is signal.SIGKILL)
        with worker(home, temporary, "second"):
            eventually(lambda: ready("second"), 60.0, "the next worker")
            assert not copies()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on files as a quota is one: what goes beyond fails while it is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    """A file system of one MiB at this folder, where the machine lets us mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
