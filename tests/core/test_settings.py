"""Settings say where they came from, refuse what they do not know, and a home is private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edif_hpc.core.errors import SettingsError
from edif_hpc.core.home import Home
from edif_hpc.core.settings import load

pytestmark = pytest.mark.fast


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "edif-hpc.toml"
    path.write_text('[gateway]\nport = 8100\n[models.dtype]\n"org/name" = "bfloat16"\n')
    return path


def test_stronger_sources_win_and_say_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(file).settings.gateway.port == 8100
    monkeypatch.setenv("EDIF_HPC_GATEWAY__PORT", "8200")
    loaded = load(file)
    assert loaded.settings.gateway.port == 8200
    assert loaded.origins["gateway.port"] == "EDIF_HPC_GATEWAY__PORT"
    loaded = load(file, {"gateway": {"port": 8300}})
    assert loaded.settings.gateway.port == 8300
    assert loaded.origins["gateway.port"] == "command line"
    assert loaded.origins["models.dtype.org/name"] == str(file)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[gateway]\nprot = 1\n", "gateway.prot .* port may be meant"),
        ("[gatway]\nport = 1\n", "gatway .* gateway may be meant"),
        ("nothing_like_it = 1\n", "nothing_like_it .* there is no such setting[.]"),
        ("[gateway]\nport = 70000\n", "gateway.port"),
        ('[worker]\nisolation = "total"\n', "worker.isolation"),
        ('[redis]\nurl = "redis://:secret@host/0"\n', "redis.url"),
        ('[redis]\nurl = "http://host"\n', "redis.url"),
        ("[gateway\n", "not TOML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(file: Path, text: str, names: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError, match=names):
        load(file)


def test_a_misspelled_variable_is_refused_with_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDIF_HPC_GATEWAY__PROT", "1")
    with pytest.raises(SettingsError, match="EDIF_HPC_GATEWAY__PROT"):
        load(file)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file"):
        load(tmp_path / "none.toml", must_exist=True)


def test_a_home_and_its_secrets_are_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    first = home.secret("redis-password")
    assert first == home.secret("redis-password")
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((home.secrets / "redis-password").stat().st_mode) == 0o600
    assert os.listdir(home.secrets) == ["redis-password"]
    (home.secrets / "redis-password").chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        home.secret("redis-password")
    home.root.chmod(0o755)
    with pytest.raises(SettingsError, match="chmod 700"):
        home.check()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "worker.isolation is empty, which means the strongest level"),
        ('[worker]\nisolation = "process"\n', "worker.isolation is process"),
        ('[worker]\nisolation = "none"\nrequired_isolation = "locked"\n', "worker.required_isolation is locked"),
        ('[worker]\nisolation = "none"\n[[pool]]\nname = "a"\nisolation = "locked"\n', "pool.a.isolation is locked"),
    ],
)
def test_several_ranks_are_refused_above_level_none(file: Path, text: str, says: str) -> None:
    file.write_text(f"[models]\ntensor_parallel = 2\n{text}")
    with pytest.raises(
        SettingsError, match=rf"models.tensor_parallel \({file}\) cannot be 2 here: .*{says}; set it to none"
    ):
        load(file)


def test_several_ranks_at_level_none_without_adapters(file: Path) -> None:
    level = '[worker]\nisolation = "none"\n[[pool]]\nname = "a"\n'
    file.write_text(f"[models]\ntensor_parallel = 2\n{level}")
    assert load(file).settings.models.tensor_parallel == 2
    file.write_text(f'[models]\ntensor_parallel = 2\nadapters = ["a/b"]\n{level}')
    with pytest.raises(SettingsError, match=r"models\.adapters names some"):
        load(file)


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        (
            '[worker]\nisolation = "process"\nrequired_isolation = "locked"\n',
            "worker.isolation",
            "worker.required_isolation demands locked",
        ),
        (
            '[worker]\nisolation = "none"\n[[pool]]\nname = "a"\nisolation = "locked"\n',
            "pool.a.isolation",
            "worker.isolation is none",
        ),
        (
            '[models]\ntensor_parallel = 4\n[worker]\nisolation = "none"\n'
            '[[pool]]\nname = "a"\naccelerator = "cuda"\ngres = "gpu:2"\n',
            "models.tensor_parallel",
            "the pool a has 2 GPUs; ask for 4",
        ),
        (
            '[worker]\ndevice = "cpu"\n[[pool]]\nname = "a"\naccelerator = "cuda"\ngres = "gpu:1"\n',
            "pool.a.accelerator",
            "worker.device is cpu",
        ),
        ('[worker]\ndevice = "cuda:0"\n[[pool]]\nname = "a"\n', "pool.a.accelerator", "worker.device is cuda:0"),
        ('[slurm]\nsbatch = "sbatch --clusters=x"\n', "slurm.sbatch", "options belong into the pools"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_their_key(
    file: Path, text: str, key: str, says: str
) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        load(file)
    assert f"The setting {key} ({file})" in str(refused.value)
    assert says in str(refused.value)
