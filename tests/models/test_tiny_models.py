"""Every tiny model really is traced by a stock nnsight on this machine, and is the same model every time."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import pytest

from tests.support import models

TRACED = [name for name in models.BUILDERS if name != "gpt2-lora"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = models.build_cache(tmp_path_factory.mktemp("hf"), models.BUILDERS)
    models.offline_client(hub)
    return hub


def load(name: str, **kwargs):
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(models.repo_id(name), task=models.task(name), **kwargs)


def last(model):
    return model.output.logits if hasattr(model, "lm_head") else model.output.last_hidden_state


@pytest.mark.parametrize("name", TRACED)
def test_a_stock_nnsight_traces_it(cache: Path, name: str) -> None:
    model = load(name)
    meta = [path for path, _ in model._module.named_parameters()]
    with model.trace(**models.sample(name, model)):
        final = last(model).save()
    assert final.shape[0] == 1
    assert final.isfinite().all()
    assert final.std() > 0.1, "all outputs nearly equal: a test of it would prove nothing"
    assert [path for path, _ in model._module.named_parameters()] == meta, "the meta build and the weights differ"
    key = json.loads(model._remoteable_model_key())
    assert key == {"repo_id": f"edif-test/{name}", "revision": None, "task": models.task(name)}


def test_an_encoder_decoder_has_both_halves(cache: Path) -> None:
    model = load("t5")
    with model.trace(**models.sample("t5", model)):
        source = model.encoder.output.last_hidden_state.save()
        target = model.decoder.output.last_hidden_state.save()
    assert source.shape[1] > target.shape[1] == 3


def test_the_image_reaches_the_language_model(cache: Path) -> None:
    model = load("qwen2.5-vl")
    with_image = models.sample("qwen2.5-vl", model)
    black = [image.point(lambda _: 0) for image in with_image["images"]]
    finals = []
    for images in (with_image["images"], black):
        with model.trace(text=with_image["text"], images=images):
            final = model.output.logits[0, -1].save()
        finals.append(final)
    assert not finals[0].equal(finals[1])


def test_the_adapter_changes_what_comes_out(cache: Path) -> None:
    finals = []
    for peft in (None, models.repo_id("gpt2-lora")):
        model = load("gpt2", peft=peft)
        with model.trace("The Eiffel Tower"):
            final = model.output.logits[0, -1].detach().save()
        finals.append(final)
    assert not finals[0].allclose(finals[1], atol=1e-3)


@pytest.mark.parametrize("text", ["The Eiffel Tower", "  two\n\nlines\t", "Zoë — 漢字 🙂", "a<|im_start|>b"])
def test_the_tokenizer_gives_back_what_it_got(cache: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.repo_id("gpt2"))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_is_an_ordinary_hub_cache(cache: Path) -> None:
    entry = cache / "models--edif-test--gpt2"
    commit = (entry / "refs" / "main").read_text()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert (entry / "snapshots" / commit / "model.safetensors").is_file()


def _commit_of(root: Path) -> str:
    hub = models.build_cache(root, ["llama"])
    return (hub / "models--edif-test--llama" / "refs" / "main").read_text()


def test_workers_that_build_at_once_share_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDIF_HPC_TEST_CACHE", str(tmp_path / "shelf"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        commits = pool.map(_commit_of, [tmp_path / "hf"] * 2)
    assert commits[0] == commits[1]
    monkeypatch.setenv("EDIF_HPC_TEST_CACHE", str(tmp_path / "another"))
    assert _commit_of(tmp_path / "hf") == commits[0], "a second build gave other weights"
