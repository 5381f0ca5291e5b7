"""up, down and everything between, with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edif_hpc import __version__
from edif_hpc.core.endpoints import store_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store
from edif_hpc.fleet import state
from tests.cli.stack import COMPONENTS, Stack, stack
from tests.support.cache_files import model_folder
from tests.support.servers import eventually


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as made:
        yield made


def test_up_prints_the_address_and_the_next_step(own: Stack):
    done = own.up()
    assert f"export NDIF_HOST={own.url}" in done.stdout
    assert own.answers()
    assert {"supervisor", *COMPONENTS} == set(own.pids())
    own.down()
    assert not own.answers()


@pytest.mark.parametrize("how", [("--detach",), ()])
def test_settings_are_found_from_another_folder_than_the_commands(tmp_path: Path, how: tuple[str, ...]):
    """Components run from a folder of their own."""
    with stack(tmp_path) as made:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "rel.toml").write_text(f"[gateway]\nport = {made.port}\n[fleet]\nworkers = 0\n")
        command = [sys.executable, "-m", "edif_hpc.cli", "up", *how, "--config", "rel.toml", "--home", str(made.home)]
        up = subprocess.Popen(
            command, cwd=tmp_path / "site", env=made.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        with up:
            eventually(lambda: made.answers() or up.poll(), 60, "the gateway")
            assert made.answers(), up.stderr and up.stderr.read()
            eventually(lambda: {"fleet", "store"} <= set(made.pids()), 30, "all components")
            rows = {row["setting"]: row["origin"] for row in made.json("config", "show")}
            assert rows["fleet.workers"] == str(tmp_path / "site" / "rel.toml")
            made.down()
            up.communicate()
        assert up.returncode == 0


def test_nothing_is_left_behind_in_an_image(tmp_path: Path):
    """What a container's first command leaves behind loses the image that it runs from."""
    with stack(tmp_path, APPTAINER_CONTAINER="/images/gateway.sif") as made:
        refused = made.up(check=False)
        assert refused.returncode == 1
        assert "without --detach" in refused.stderr
        assert not made.home.exists()


def test_down_leaves_no_process_no_record_and_no_socket(own: Stack):
    own.up()
    eventually(lambda: "store" in own.pids(), what="the store")
    ports = json.loads((own.home / "run" / "ports.json").read_text()).values()

    def sockets() -> list[Path]:
        return [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]

    eventually(sockets, what="the sockets that SeaweedFS lays into /tmp")
    assert len(own.processes()) >= 5
    done = own.down()
    assert sockets() == []
    assert own.processes() == []
    assert done.stdout == "Down.\n"
    left = {path.name for path in (own.home / "run").glob("*.json")}
    assert left <= {"ports.json", "failures.json"}
    assert own.run("down").stdout == "Down.\n"


def test_up_after_the_supervisors_death_adopts_what_lives_and_starts_what_does_not(own: Stack):
    own.up()
    eventually(lambda: set(COMPONENTS) <= set(own.pids()), what="all components")
    before = own.pids()
    own.kill("supervisor")
    own.kill("fleet")
    eventually(lambda: set(own.pids()) == set(COMPONENTS) - {"fleet"}, what="the end of those two alone")
    own.up()
    eventually(lambda: "fleet" in own.pids(), what="the fleet")
    after = own.pids()
    assert {name: after[name] for name in ("gateway", "redis", "store")} == {
        name: before[name] for name in ("gateway", "redis", "store")
    }
    # Adopted components are no children, and are watched all the same.
    own.back("redis", own.kill("redis"))


def test_up_waits_for_a_down_that_is_at_work(own: Stack):
    """For which the lock is held and no supervisor is recorded; this test is that `down`."""
    own.up()
    own.down()
    held = state.lock(Home(own.home))
    assert held is not None
    waiting = own.start("up", "--detach", "--port", str(own.port))
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2)
    finally:
        os.close(held)
    out, _ = waiting.communicate(timeout=60)
    assert out.startswith("Up."), out
    assert own.answers()


def test_down_works_without_a_supervisor(own: Stack):
    own.up()
    eventually(lambda: set(COMPONENTS) <= set(own.pids()), what="all components")
    own.kill("supervisor")
    own.down()
    assert own.processes() == []


def test_a_taken_port_is_refused_in_one_sentence(own: Stack):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", own.port))
        taken.listen()
        done = own.up(check=False)
    assert done.returncode == 1
    assert f"Port {own.port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert own.processes() == []


def test_a_taken_redis_port_is_replaced_or_refused(own: Stack):
    own.up()
    own.down()
    ports = json.loads((own.home / "run" / "ports.json").read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports["redis"]))
        taken.listen()
        own.up()
        assert json.loads((own.home / "run" / "ports.json").read_text())["redis"] != ports["redis"]
        own.down()
        own.variables = {"EDIF_HPC_REDIS__PORT": str(ports["redis"])}
        done = own.up(check=False)
    assert done.returncode == 1
    assert own.processes() == []


def test_options_of_up_hold_for_restarted_components_and_other_commands(own: Stack):
    own.variables = {"EDIF_HPC_WORKER__SPARES": "1"}
    own.up("--isolation", "process")
    own.variables = {}
    eventually(lambda: "gateway" in own.pids(), what="the gateway")
    own.back("gateway", own.kill("gateway"))
    eventually(lambda: own.answers(), what="the gateway at its port")
    rows = {row["setting"]: (row["value"], row["origin"]) for row in own.json("config", "show")}
    assert rows["gateway.port"] == (own.port, "command line")
    assert rows["worker.isolation"] == ("process", "command line")
    assert rows["worker.spares"] == (1, "EDIF_HPC_WORKER__SPARES")
    own.down()
    rows = {row["setting"]: row["value"] for row in own.json("config", "show")}
    assert rows["worker.isolation"] is None


def test_a_home_in_use_on_another_machine_is_refused(own: Stack):
    home = Home(own.home).create()
    record = {
        "name": "gateway", "pid": 1, "ticks": 1, "boot": "x", "host": "login7", "version": __version__, "started": 0.0,
    }  # fmt: skip
    (home.run / "gateway.json").write_text(json.dumps(record))
    done = own.up(check=False)
    assert done.returncode == 1
    assert "login7" in done.stderr


def test_a_reused_pid_is_not_mistaken_for_a_component(own: Stack):
    home = Home(own.home).create()
    record = {
        "name": "gateway", "pid": os.getpid(), "ticks": 1, "boot": "x", "host": socket.gethostname(),
        "version": "0.0.1", "started": 0.0,
    }  # fmt: skip
    (home.run / "gateway.json").write_text(json.dumps(record))
    own.up()
    own.down()
    assert psutil.pid_exists(os.getpid())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_foreground_stops_everything(own: Stack, how: signal.Signals):
    command = [sys.executable, "-m", "edif_hpc.cli", "up", "--port", str(own.port), "--home", str(own.home)]
    with (own.home.parent / "output").open("w+") as output:
        process = subprocess.Popen(command, env=own.environment(), stdout=output, stderr=output)
        said = own.home.parent / "output"
        eventually(lambda: "Ctrl-C stops it" in said.read_text(), what="the gateway")
        process.send_signal(how)
        assert process.wait(60) == 0
        output.seek(0)
        text = output.read()
    assert "stopping gateway" in text
    assert "Traceback" not in text
    assert own.processes() == []


def test_a_gateway_that_cannot_start_ends_up_with_its_last_words(own: Stack):
    # An address this machine does not have can be known to be wrong only by trying.
    done = own.run("up", "--detach", "--host", "192.0.2.77", "--port", str(own.port), check=False)
    assert done.returncode == 1
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert own.processes() == []


def test_what_was_acknowledged_survives_kill(own: Stack):
    own.up()
    home = Home(own.home)
    store = Store(store_endpoint(home, Settings()))

    def put() -> bool:
        try:
            store.put("results/r/1", b"kept" * 300_000)
        except Unavailable:
            return False
        return True

    eventually(put, 60, "the store taking an object")
    own.run("keys", "create", "ada")
    for name in ("store", "redis"):
        own.back(name, own.kill(name))

    def read() -> bool:
        try:
            return store.get("results/r/1") == b"kept" * 300_000
        except Unavailable:
            return False

    eventually(read, 60, "the object being there")
    assert "ada" in {row["user"] for row in own.json("keys", "list")}


def test_status_says_why_the_fleet_pauses(own: Stack):
    own.variables = {"EDIF_HPC_WORKER__DEVICE": "cuda:77"}
    own.up()
    own.run("models", "pull", str(model_folder(own.home.parent / "mine")), "--name", "org/name")
    command = [sys.executable, "-m", "edif_hpc.cli", "models", "load", "org/name", "--home", str(own.home)]
    with subprocess.Popen(command, env=own.environment(), stderr=subprocess.DEVNULL) as wanting:
        notices = eventually(lambda: own.json("status")["notices"], 60, "a notice of the fleet")
        said = own.run("status").stdout
        wanting.kill()
    assert "worker.device is 'cuda:77'" in notices["pool:local"]
    assert "pool local: " in said
    assert "worker.device is 'cuda:77'" in said


def test_doctor_fails_on_a_home_that_is_down_and_says_what_to_do(own: Stack):
    Home(own.home).create()
    done = own.run("doctor", check=False)
    assert done.returncode == 1
    assert "edif-hpc up" in done.stdout
