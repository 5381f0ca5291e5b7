"""What the cache holds, told from headers alone: sizes, dtypes, forms that are refused, names that are tricks."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.core.errors import ModelError
from edif_hpc.hardware.checkpoint import broken_models, describe, list_models
from tests.support.cache_files import COMMIT, CONFIG, TENSORS, entry, tensors_bytes

pytestmark = pytest.mark.fast

LLAMA, ONE = CONFIG, TENSORS


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int]]], short: int = 0) -> None:
    data = tensors_bytes(tensors)
    path.write_bytes(data[: len(data) - short])


def test_one_file(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config=LLAMA)
    write_tensors(snapshot / "model.safetensors", ONE)
    found = describe(tmp_path, "org/name")
    assert found.path == snapshot
    assert (found.commit, found.dtype, found.parameters, found.stored_bytes) == (COMMIT, "bfloat16", 40, 96)
    assert found.counts == (("BF16", 32), ("F32", 8))
    assert (found.architectures, found.model_type) == (("LlamaForCausalLM",), "llama")
    assert not found.custom_code
    assert not found.adapter


def test_several_files_and_an_index(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config=LLAMA)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        write_tensors(snapshot / name, ONE)
    write_tensors(snapshot / "consolidated.safetensors", ONE)  # transformers does not load it either
    index = {"weight_map": {"a.weight": names[0], "b.bias": names[0], "c.weight": names[1]}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert describe(tmp_path, "org/name").parameters == 80
    (snapshot / names[1]).unlink()
    os.utime(snapshot, (1, 1))
    with pytest.raises(ModelError, match=r"incomplete in the cache \(1 of 2 weight files"):
        describe(tmp_path, "org/name")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({}, "bfloat16"),
        ({"dtype": "auto"}, "bfloat16"),
        ({"dtype": 7}, "bfloat16"),
    ],
)
def test_the_dtype_that_auto_means(tmp_path: Path, config: dict, dtype: str) -> None:
    write_tensors(entry(tmp_path, config=config) / "model.safetensors", ONE)
    assert describe(tmp_path, "org/name").dtype == dtype


def test_custom_code_is_seen_in_any_file_that_can_ask_for_it(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        cache = tmp_path / name
        snapshot = entry(cache, config={})
        (snapshot / name).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
        write_tensors(snapshot / "model.safetensors", ONE)
        assert describe(cache, "org/name").custom_code


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    snapshot = entry(tmp_path)
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    write_tensors(snapshot / "adapter_model.safetensors", ONE)
    found = describe(tmp_path, "org/name")
    assert (found.adapter, found.base, found.parameters) == (True, "org/base", 40)


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config={**LLAMA, "quantization_config": {"quant_method": "gptq"}})
    write_tensors(snapshot / "model.safetensors", {"q": ("I8", [100])})
    assert describe(tmp_path, "org/name").quantization == "gptq"


# -- refusals: one sentence, with what to do ---------------------------------------------------------------------------


def refused(cache: Path, repo_id: str = "org/name", revision: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        describe(cache, repo_id, revision)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert "Traceback" not in sentence
    assert str(cache) not in sentence, "a stranger learns a path of the service"
    return sentence


def test_not_in_the_cache(tmp_path: Path) -> None:
    assert "edif-hpc models pull org/name" in refused(tmp_path)
    assert "edif-hpc models pull org/name" in refused(tmp_path / "no cache yet")


def test_another_revision(tmp_path: Path) -> None:
    write_tensors(entry(tmp_path, config=LLAMA) / "model.safetensors", ONE)
    assert "not its revision 'v2'" in refused(tmp_path, revision="v2")
    assert "not its revision" in refused(tmp_path, revision="f" * 40)
    assert describe(tmp_path, "org/name", COMMIT).commit == COMMIT


def test_nested_ref(tmp_path: Path) -> None:
    write_tensors(entry(tmp_path, config=LLAMA, ref="refs/pr/1") / "model.safetensors", ONE)
    assert describe(tmp_path, "org/name", "refs/pr/1").parameters == 40
    assert "not its revision 'main'" in refused(tmp_path)
    assert "not its revision 'refs/pr'" in refused(tmp_path, revision="refs/pr")


def test_only_pickled_weights(tmp_path: Path) -> None:
    (entry(tmp_path, config=LLAMA) / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refused(tmp_path)
    assert "save_pretrained" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1}x',
    ],
)
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    (entry(tmp_path, config=LLAMA) / "model.safetensors").write_bytes(content)
    assert "damaged" in refused(tmp_path)


def test_weights_cut_short(tmp_path: Path) -> None:
    write_tensors(entry(tmp_path, config=LLAMA) / "model.safetensors", ONE, short=1)
    assert "cut short" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    snapshot = entry(tmp_path)
    (snapshot / "config.json").write_text(text)
    assert "config.json" in refused(tmp_path)


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config=LLAMA)
    index = {"weight_map": {"a": "../../../../secret.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "damaged" in refused(tmp_path)


TRICKS = ["", ".", "..", "../x", "a/../b", "/etc", "a//b", "a/", "/a", "a\0b", "a\nb", "ä/b", "~root"]


@pytest.mark.parametrize("repo_id", [*TRICKS, "a--b/c", "a/b/c", "a" * 97, "a/.git", "x.git", "-a/b", "a\n"])
def test_names_that_are_tricks(tmp_path: Path, repo_id: str) -> None:
    assert "cannot be the name of a model" in refused(tmp_path, repo_id)


@pytest.mark.parametrize("revision", [*TRICKS, "a" * 129, "refs/../../x", "main\n"])
def test_revisions_that_are_tricks(tmp_path: Path, revision: str) -> None:
    write_tensors(entry(tmp_path, config=LLAMA) / "model.safetensors", ONE)
    assert "cannot be a revision" in refused(tmp_path, revision=revision)


def test_a_folder_that_leads_out_of_the_cache(tmp_path: Path) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "hub"
    write_tensors(entry(outside, config=LLAMA) / "model.safetensors", ONE)
    cache.mkdir()
    (cache / "models--org--name").symlink_to(outside / "models--org--name")
    assert "not in this service's cache" in refused(cache)
    (cache / "models--org--loop").symlink_to(cache / "models--org--loop")
    assert "not in this service's cache" in refused(cache, "org/loop")


def test_a_ref_that_leads_out_of_the_cache(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config=LLAMA)
    (snapshot.parents[1] / "refs" / "main").write_text("../../../etc")
    assert "not its revision" in refused(tmp_path)


def test_blobs_may_live_elsewhere(tmp_path: Path) -> None:
    cache, shared = tmp_path / "hub", tmp_path / "shared"
    shared.mkdir()
    write_tensors(shared / "blob", ONE)
    (entry(cache, config=LLAMA) / "model.safetensors").symlink_to(shared / "blob")
    assert describe(cache, "org/name").parameters == 40


# -- many, often -------------------------------------------------------------------------------------------------------


def test_listing(tmp_path: Path) -> None:
    write_tensors(entry(tmp_path, "org/good", LLAMA) / "model.safetensors", ONE)
    write_tensors(entry(tmp_path, "plain", LLAMA) / "model.safetensors", ONE)
    entry(tmp_path, "org/bad")
    (tmp_path / "models--").mkdir()
    (tmp_path / ".locks").mkdir()
    assert [found.repo_id for found in list_models(tmp_path)] == ["org/good", "plain"]
    assert set(broken_models(tmp_path)) == {"org/bad", ""}
    assert list_models(tmp_path / "none") == []


def test_a_change_is_seen(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config=LLAMA)
    write_tensors(snapshot / "model.safetensors", ONE)
    before = describe(tmp_path, "org/name")
    assert describe(tmp_path, "org/name") is before
    other = snapshot.with_name("f" * 40)
    other.mkdir()
    (other / "config.json").write_text("{}")
    write_tensors(other / "model.safetensors", {"a": ("F32", [1])})
    (snapshot.parents[1] / "refs" / "main").write_text("f" * 40)
    assert describe(tmp_path, "org/name").parameters == 1


def test_a_model_that_goes_away(tmp_path: Path) -> None:
    snapshot = entry(tmp_path, config=LLAMA)
    write_tensors(snapshot / "model.safetensors", ONE)
    describe(tmp_path, "org/name")
    snapshot.parents[1].rename(tmp_path / "gone")
    refused(tmp_path)


def test_no_torch_at_import() -> None:
    code = (
        "import sys, edif_hpc.hardware.checkpoint, edif_hpc.hardware.memory, edif_hpc.hardware.detect;"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
