"""Which models a request may bring up, how several share one worker, and what is said when one cannot be had."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend, RemoteError
from nnsight.schema.response import Status

from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import Stack, client_of, running

from .support import PROMPT, ask, key_of, result_of, seen_by, sleeping, tiny, withdraw

pytestmark = pytest.mark.xdist_group("stock-models")

NAMES = ("gpt2", "llama", "qwen3")
ROOM = 2 * 1024**3
"""Bytes for models: two tiny ones, which cost some 800 MiB each whatever their weights."""
SETTINGS = f"""
allow = ["edif-test/gpt2", "edif-test/llama", "edif-test/qwen3", "edif-test/made-*"]
[worker]
memory_bytes = {ROOM}
threads = 1
idle_seconds = 3600
"""
HEADER_LENGTH = struct.Struct("<Q")
PATIENT = 60
"""Requests of a second each: more than a third user waits for."""
QUICK_SECONDS = 10.0
"""A refusal at the door takes milliseconds; on a busy machine, less than this."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual models, and some that were made to be refused."""
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), [*NAMES, "mixtral"])
    weights = copied(hub, "made-truncated") / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    config = copied(hub, "made-contradictory") / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 64', '"n_embd": 32'))
    weights = copied(hub, "made-huge") / "model.safetensors"
    elements = ROOM  # of four bytes each
    header = json.dumps({"wte": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}).encode()
    with weights.open("wb") as file:
        file.write(HEADER_LENGTH.pack(len(header)) + header)
        file.truncate(HEADER_LENGTH.size + len(header) + 4 * elements)  # sparse: takes no space
    return hub


def copied(hub: Path, name: str) -> Path:
    """A copy of tiny GPT-2 under another name; its snapshot folder."""
    target = hub / f"models--edif-test--{name}"
    shutil.copytree(hub / "models--edif-test--gpt2", target)
    return next((target / "snapshots").iterdir())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, hub: Path) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("stock-models") / "home", hub, "process", SETTINGS) as found:
        yield found


@pytest.fixture
def stack(service: Stack, hub: Path) -> Iterator[Stack]:
    models.offline_client(hub)
    with client_of(service):
        yield service


@pytest.fixture(scope="module")
def local(hub: Path) -> dict[str, torch.Tensor]:
    models.offline_client(hub)
    torch.set_num_threads(1)
    return {name: logits(tiny(name, dispatch=True)) for name in NAMES}


def logits(model: Any, **how: Any) -> torch.Tensor:
    with model.trace(PROMPT, **how):
        found = model.lm_head.output[0, -1].clone().save()
    return found  # noqa: RET504 - a save is read after the block


def held() -> set[str]:
    """The models that workers hold, without their organisation."""
    found = nnsight.status()
    return {name.removeprefix("edif-test/") for name in found if found[name]["state"] == "RUNNING"}


def key_for(repo_id: str, **fields: Any) -> str:
    klass, _, suffix = tiny().to_model_key().partition(":")
    return f"{klass}:{json.dumps({**json.loads(suffix), 'repo_id': repo_id, **fields})}"


@pytest.mark.parametrize(
    ("repo_id", "fields", "words"),
    [
        ("edif-test/made-up", {}, ["edif-test/made-up", "not in this service's cache"]),
        ("edif-test/gpt2", {"revision": "another"}, ["revision 'another'"]),
        ("edif-test/mixtral", {}, ["edif-test/mixtral", "may not be used", "models.allow"]),
        ("edif-test/gpt2", {"trust_remote_code": True}, ["edif-test/gpt2", "trust_remote_code"]),
        ("edif-test/made-huge", {}, ["edif-test/made-huge", "9.5 GiB", "2.0 GiB"]),
        ("edif-test/made-truncated", {}, ["edif-test/made-truncated", "cut short", "pull the model again"]),
    ],
)
def test_refused_at_once(stack: Stack, repo_id: str, fields: dict[str, Any], words: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        ask(tiny(), 1, lambda _, **options: RemoteBackend(key_for(repo_id, **fields), **options))
    assert time.monotonic() - began < QUICK_SECONDS
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in sentence


def test_weights_that_contradict_their_config_end_in_a_sentence(stack: Stack) -> None:
    """It looks right from outside, so a worker tries; nobody waits for ever, and the next model loads."""
    with pytest.raises(RemoteError) as caught:
        ask(tiny(), 1, lambda _, **options: RemoteBackend(key_for("edif-test/made-contradictory"), **options))
    assert "edif-test/made-contradictory could not be loaded" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert logits(tiny(), remote=True).shape == (512,)


def test_three_models_share_room_for_two(stack: Stack, local: dict[str, torch.Tensor]) -> None:
    """The least recently used one leaves, and whoever waits is told so; every answer is right."""
    for name in ("gpt2", "llama"):
        assert torch.equal(logits(tiny(name), remote=True), local[name])
    eventually(lambda: held() == {"gpt2", "llama"}, what="two models held")
    statuses, result = seen_by(ask(tiny("qwen3"), 5, AsyncRemoteBackend))
    assert float(result["answer"]) == 5
    texts = [update.description for update in statuses if update.status is Status.DEPLOYING]
    assert any("edif-test/gpt2 leaves" in text for text in texts), texts
    eventually(lambda: held() == {"llama", "qwen3"}, what="gpt2 being evicted")
    for name in ("llama", "gpt2"):  # llama was used last, so qwen3 goes
        assert torch.equal(logits(tiny(name), remote=True), local[name])
    eventually(lambda: held() == {"llama", "gpt2"}, what="qwen3 being evicted")


def test_nobody_starves_while_others_keep_their_models_busy(stack: Stack) -> None:
    """Two users keep both models that fit busy without a pause; a third asks for another one, and theirs come back."""
    streams = {name: [] for name in ("gpt2", "llama")}
    for name, stream in streams.items():
        model, key = tiny(name), key_of(stack, f"user-of-{name}")
        result_of(ask(model, 1, blocking=False))
        stream += [sleeping(model, 1.0, api_key=key) for _ in range(PATIENT)]
    third = ask(tiny("qwen3"), 3, blocking=False, api_key=key_of(stack, "third"))
    assert float(result_of(third)["answer"]) == 3
    for stream in streams.values():
        *rest, last = stream
        assert last.poll() is None  # it did not wait for all of theirs
        for request in rest:
            withdraw(stack, request)
        assert result_of(last)["answer"].isfinite()
