"""The face of the command line, without a server: help, refusals, settings and their documentation."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from edif_hpc.cli.config import documented, markdown
from edif_hpc.cli.http import address, api_key
from edif_hpc.cli.logs import readable
from edif_hpc.cli.main import app
from edif_hpc.cli.show import duration, size
from edif_hpc.core.endpoints import OWNER_KEY
from edif_hpc.core.home import Home
from tests.cli.stack import Stack

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
WITHOUT_HOME = {"config docs", "image build", "image check", "methods"}


def commands(command: click.Command, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """Every command that can be run, by its full name."""
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    return {
        name: found
        for word, inner in command.commands.items()
        for name, found in commands(inner, (*path, word)).items()
    }


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_with_examples_and_takes_a_home(name: str):
    command = COMMANDS[name]
    options = {option for parameter in command.params for option in parameter.opts}
    if name not in WITHOUT_HOME:
        assert "--home" in options
    if not command.hidden:
        assert "Example" in (command.help or "")
        assert f"edif-hpc {name}" in (command.help or "")


def test_help_is_quick_and_loads_nothing_heavy():
    script = "import sys; from edif_hpc.cli.main import app; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for heavy in ("redis", "pydantic", "boto3", "fastapi", "torch", "nnsight", "httpx", "psutil"):
        assert f"'{heavy}'" not in loaded


def test_a_refusal_is_one_sentence_and_exit_code_one(tmp_path: Path):
    done = Stack(tmp_path / "nowhere").run("ps", check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "edif-hpc up" in done.stderr


def test_wrong_usage_is_exit_code_two(tmp_path: Path):
    assert Stack(tmp_path / "home").run("up", "--port", "many", check=False).returncode == 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[gateway]\nport = 0", "gateway.port"),
        ("[gateway]\nprot = 1", "gateway.prot"),
        ('[redis]\nurl = "redis://me:secret@there"', "redis.url"),
        ("[gateway", "not TOML"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, line: str, named: str):
    stack = Stack(tmp_path / "home")
    config = tmp_path / "site.toml"
    config.write_text(line)
    done = stack.run("up", "--config", str(config), check=False)
    assert done.returncode == 1
    assert named in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_others_can_enter_is_refused(tmp_path: Path):
    stack = Stack(tmp_path / "home")
    stack.home.mkdir(mode=0o755)
    done = stack.run("ps", check=False)
    assert done.returncode == 1
    assert "chmod 700" in done.stderr
    assert stat.S_IMODE(stack.home.stat().st_mode) == 0o755


def test_config_show_tells_where_each_value_came_from(tmp_path: Path):
    stack = Stack(tmp_path / "home", variables={"EDIF_HPC_WORKER__CONCURRENCY": "3"})
    stack.home.mkdir(mode=0o700)
    (stack.home / "edif-hpc.toml").write_text("[gateway]\nport = 9000\n")
    rows = {row["setting"]: row for row in stack.json("config", "show")}
    assert rows["gateway.port"] == {
        "setting": "gateway.port",
        "value": 9000,
        "origin": str(stack.home / "edif-hpc.toml"),
    }
    assert rows["worker.concurrency"]["value"] == 3
    assert rows["worker.concurrency"]["origin"] == "EDIF_HPC_WORKER__CONCURRENCY"
    assert rows["redis.port"]["origin"] == "default"
    assert set(rows) == {name.partition(".")[0] if name.startswith("pool.") else name for name in documented()}


def test_every_setting_is_documented():
    undocumented = [name for name, (_, description) in documented().items() if not description.endswith(".")]
    assert not undocumented


def test_the_readme_holds_the_settings_as_they_are():
    readme = (ROOT / "README.md").read_text()
    assert markdown() in readme, "run `edif-hpc config docs` and put its table into the README"


def test_the_owners_key_goes_to_the_homes_own_gateway_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith(("NDIF_", "EDIF_HPC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    home = Home(tmp_path / "home").create()
    owner = home.secret(OWNER_KEY)
    assert api_key(home, address(home)) == owner
    monkeypatch.setenv("NDIF_HOST", "https://elsewhere.example")
    assert address(home) == "https://elsewhere.example"
    assert api_key(home, address(home)) == ""
    saved = tmp_path / "config" / "nnsight" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("API:\n  APIKEY: 'saved-key'\n  HOST: x\n")
    assert api_key(home, address(home)) == "saved-key"
    monkeypatch.setenv("NDIF_API_KEY", "given-key")
    assert api_key(home, address(home)) == "given-key"


def test_log_lines_are_read_by_people():
    line = '{"room": "fleet", "pool": "local", "event": "gone", "level": "info", "timestamp": "2026-01-02T03:04:05.6Z"}'
    assert readable(line) == "2026-01-02 03:04:05 info    gone  pool=local"
    assert readable("not json") == "not json"
    assert readable("[1]") == "[1]"


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "2 KiB"), (3 * 1024**3, "3.0 GiB")])
def test_sizes(number: int, text: str):
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (90000, "1 d 1 h")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_the_version_is_printed():
    done = subprocess.run([sys.executable, "-m", "edif_hpc.cli", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize("command", [("list",), ("show", "gpu"), ("script", "gpu")])
def test_what_would_be_submitted_is_seen_before_anything_is_started(tmp_path: Path, command: tuple[str, ...]):
    (tmp_path / "site.toml").write_text('[[pool]]\nname = "gpu"\naccelerator = "cuda"\ngres = "gpu:1"\n')
    home = Stack(tmp_path / "home")
    done = home.run("pool", *command, "--config", str(tmp_path / "site.toml"))
    assert "gpu" in done.stdout
    assert not home.home.exists()
