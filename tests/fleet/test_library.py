"""The shared cache is only ever whole: folders and Hub downloads go in at once, refusals leave it as it was."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.core.errors import ModelError
from edif_hpc.fleet.library import adopt, pull, remove
from edif_hpc.fleet.shelf import Progress
from edif_hpc.hardware.checkpoint import describe, list_models
from tests.support.cache_files import CONFIG, TENSORS, model_folder, tensors_bytes
from tests.support.hub import FakeHub, fake_hub

pytestmark = pytest.mark.fast


def everything(cache: Path) -> list[str]:
    """All paths of a cache but the locks, which stay."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if ".locks" not in p.parts)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_an_ordinary_entry(tmp_path: Path) -> None:
    cache, folder = tmp_path / "hub", model_folder(tmp_path / "mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "extra.json").write_text("{}")
    found = pull(str(folder), cache, name="org/name")
    assert found == describe(cache, "org/name")
    assert found.parameters == 40
    assert (cache / "models--org--name" / "refs" / "main").read_text() == found.commit
    for path in found.path.rglob("*.json"):
        assert path.is_symlink()
        assert path.resolve().parent == cache / "models--org--name" / "blobs"
    assert json.loads((found.path / "config.json").read_text()) == CONFIG
    assert (found.path / "sub" / "extra.json").read_text() == "{}"


def test_huggingface_hub_finds_it_too(tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    found = pull(str(model_folder(tmp_path / "mine")), tmp_path / "hub", name="org/name")
    assert snapshot_download("org/name", cache_dir=tmp_path / "hub", local_files_only=True) == str(found.path)


def test_the_same_folder_again_changes_nothing(tmp_path: Path) -> None:
    cache, folder = tmp_path / "hub", model_folder(tmp_path / "mine")
    first = adopt(folder, cache, "org/name")
    before = everything(cache)
    assert adopt(folder, cache, "org/name").commit == first.commit
    assert everything(cache) == before


def test_a_changed_folder_is_another_commit_and_the_old_one_stays(tmp_path: Path) -> None:
    cache, folder = tmp_path / "hub", model_folder(tmp_path / "mine")
    first = adopt(folder, cache, "org/name")
    (folder / "model.safetensors").write_bytes(tensors_bytes({"a": ("F32", [3])}))
    second = adopt(folder, cache, "org/name")
    assert describe(cache, "org/name").commit == second.commit != first.commit
    assert describe(cache, "org/name", first.commit).parameters == 40


def test_a_damaged_entry_is_mended(tmp_path: Path) -> None:
    cache, folder = tmp_path / "hub", model_folder(tmp_path / "mine")
    found = adopt(folder, cache, "org/name")
    (found.path / "model.safetensors").resolve().write_bytes(b"cut")
    os.utime(found.path, (1, 1))
    with pytest.raises(ModelError, match="damaged"):
        describe(cache, "org/name")
    assert adopt(folder, cache, "org/name").parameters == 40


def test_pickles_and_hidden_files_stay_out(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine", **{"pytorch_model.bin": b"x", "optimizer.pt": b"x", ".secret": b"x"})
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    found = adopt(folder, tmp_path / "hub", "org/name")
    assert sorted(path.name for path in found.path.iterdir()) == ["config.json", "model.safetensors"]


def test_without_a_name_it_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert pull("./mine", tmp_path / "hub").repo_id == "local/mine"


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[Progress] = []
    adopt(model_folder(tmp_path / "mine"), tmp_path / "hub", "org/name", seen.append)
    assert seen[-1].done == seen[-1].total > 0
    assert [p.done for p in seen] == sorted(p.done for p in seen)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("./none", {}, "There is no folder"),
        ("./mine", {"revision": "main"}, "has no revisions"),
        ("./mine", {"name": "../../etc"}, "cannot be the name of a model"),
        ("org/name", {"name": "org/other"}, "keeps its own name"),
        ("a/b/c", {}, "cannot be the name of a model"),
        ("./empty", {"name": "org/name"}, "has no config.json"),
        ("./pickled", {"name": "org/name"}, "no safetensors weights"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    (model_folder(tmp_path / "pickled", **{"pytorch_model.bin": b"x"}) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=says):
        pull(source, tmp_path / "hub", **options)
    assert everything(tmp_path / "hub") == []


def test_stopping_half_way_leaves_nothing(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="nothing half-done was left"):
        adopt(model_folder(tmp_path / "mine"), tmp_path / "hub", "org/name", stop)
    assert everything(tmp_path / "hub") == []


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EIO, "error")])
def test_a_full_disk_is_one_sentence(tmp_path: Path, code: int, says: str) -> None:
    def fill(progress: Progress) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(ModelError, match=says):
        adopt(model_folder(tmp_path / "mine"), tmp_path / "hub", "org/name", fill)
    assert everything(tmp_path / "hub") == []


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "hub" / ".staging-models--org--name"
    (left / "models--org--name" / "blobs").mkdir(parents=True)
    adopt(model_folder(tmp_path / "mine"), tmp_path / "hub", "org/name")
    assert not left.exists()


def _adopt_often(folder: Path, cache: Path) -> str:
    return adopt(folder, cache, "org/name").commit


def test_two_at_once(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        commits = pool.starmap(_adopt_often, [(folder, tmp_path / "hub")] * 6)
    assert len(set(commits)) == 1
    assert len(list_models(tmp_path / "hub")) == 1


def test_remove(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    adopt(model_folder(tmp_path / "mine"), cache, "org/name")
    assert remove(cache, "org/name") >= len(tensors_bytes(TENSORS))
    assert everything(cache) == []
    for name in ("org/name", "../hub"):
        with pytest.raises(ModelError):
            remove(cache, name)


# -- the Hub: in a child process, because huggingface_hub reads its environment once, at import ------------------------

PULL = """
import json, sys
from pathlib import Path
from edif_hpc.core.errors import EdifError
from edif_hpc.fleet.library import pull
steps = []
try:
    found = pull(sys.argv[1], Path(sys.argv[2]), sys.argv[3] or None, steps.append)
    print(json.dumps({"commit": found.commit, "parameters": found.parameters, "step": vars(steps[-1]) if steps else 0}))
except EdifError as error:
    print(json.dumps({"error": type(error).__name__, "says": str(error)}))
"""
COMMIT = "89abcdef" * 5


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        weights = tensors_bytes(TENSORS)
        files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights, "pytorch_model.bin": b"x"}
        server.repos["org/name"] = (COMMIT, files)
        server.repos["org/gated"] = (COMMIT, files)
        server.gated.add("org/gated")
        yield server


def pulled(
    hub: FakeHub, cache: Path, source: str = "org/name", revision: str = "", **environment: str
) -> dict[str, object]:
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache.parent / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", PULL, source, str(cache), revision]
    # Not this process's own Hugging Face settings: other tests in it may have gone offline.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(command, env={**inherited, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    got = pulled(hub, cache)
    assert got["commit"] == COMMIT
    assert got["step"]["done"] == got["step"]["total"] > 0
    found = describe(cache, "org/name")
    assert sorted(path.name for path in found.path.iterdir()) == ["config.json", "model.safetensors"]
    assert not list(cache.glob(".staging*"))
    hub.asked.clear()
    assert pulled(hub, cache)["commit"] == COMMIT
    assert not [line for line in hub.asked if "/resolve/" in line], "it downloaded again"


def test_a_revision_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    assert pulled(hub, cache, revision="v1")["commit"] == COMMIT
    assert describe(cache, "org/name", "v1").commit == COMMIT
    with pytest.raises(ModelError, match="not its revision 'main'"):
        describe(cache, "org/name")
    pulled(hub, cache, revision=COMMIT)
    assert sorted(path.name for path in (cache / "models--org--name" / "refs").iterdir()) == ["v1"]


@pytest.mark.parametrize(
    ("source", "revision", "environment", "error", "says"),
    [
        ("org/none", "", {}, "ModelError", "The Hub has no model 'org/none'"),
        ("org/name", "v9", {}, "ModelError", "no revision 'v9'"),
        ("org/gated", "", {}, "ModelError", "is gated; accept its terms"),
        ("org/name", "", {"HF_HUB_OFFLINE": "1"}, "Unavailable", "cannot be reached from here"),
        ("org/name", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Unavailable", "cannot be reached from here"),
    ],
)
def test_what_the_hub_refuses(
    hub: FakeHub, tmp_path: Path, source: str, revision: str, environment: dict[str, str], error: str, says: str
) -> None:
    got = pulled(hub, tmp_path / "hub", source, revision, **environment)
    assert got["error"] == error
    assert says in str(got["says"])
    assert not list(tmp_path.glob("hub/models--*"))


def test_a_download_that_breaks_is_taken_up_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken.add("model.safetensors")
    got = pulled(hub, tmp_path / "hub")
    assert got["error"] == "Unavailable"
    assert not list(tmp_path.glob("hub/models--*"))
    hub.broken.clear()
    hub.asked.clear()
    assert pulled(hub, tmp_path / "hub")["parameters"] == 40
    assert not [line for line in hub.asked if line.startswith("GET") and line.endswith("config.json")]


def test_without_huggingface_hub(tmp_path: Path) -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None\n" + PULL
    done = subprocess.run(
        [sys.executable, "-c", code, "org/name", str(tmp_path), ""], capture_output=True, text=True, check=True
    )
    assert "pip install huggingface_hub" in done.stdout


def test_no_torch_at_import() -> None:
    code = (
        "import sys, edif_hpc.fleet.library, edif_hpc.fleet.demo_model, edif_hpc.fleet.hub;"
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub', 'httpx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
