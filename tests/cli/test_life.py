"""up, down and everything between, with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from edif_hpc import __version__
from edif_hpc.core.endpoints import redis_endpoint, store_endpoint
from edif_hpc.core.errors import Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import Store
from tests.cli.stack import Stack, stack
from tests.support.servers import eventually, free_port

COMPONENTS = ("gateway", "fleet", "redis", "store")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("running")) as made:
        made.up()
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    with stack(tmp_path) as made:
        yield made


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ping", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_up_prints_the_address_and_the_next_step(own: Stack):
    done = own.up()
    assert f"export NDIF_HOST={own.url}" in done.stdout
    assert answers(own.url)
    assert {"supervisor", *COMPONENTS} == set(own.pids())
    own.down()
    assert not answers(own.url)


def test_down_leaves_no_process_and_no_record(own: Stack):
    own.up()
    eventually(lambda: "store" in own.pids(), what="the store")
    assert len(own.processes()) >= 5
    done = own.down()
    assert own.processes() == []
    assert done.stdout == "Down.\n"
    left = {path.name for path in (own.home / "run").glob("*.json")}
    assert left <= {"ports.json", "failures.json"}
    assert own.run("down").stdout == "Down.\n"


def test_up_again_leaves_everything_alone(running: Stack):
    before = running.pids()
    done = running.up()
    assert "Running already" in done.stdout
    assert running.pids() == before


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_killed_component_comes_back(running: Stack, name: str):
    before = running.pids()
    killed = running.kill(name)
    running.back(name, killed)
    after = running.pids()
    assert {key: pid for key, pid in after.items() if key != name} == {
        key: pid for key, pid in before.items() if key != name
    }
    eventually(lambda: answers(running.url), what="the gateway")
    assert "killed by SIGKILL" in (running.home / "logs" / "supervisor.log").read_text()


def test_up_after_the_supervisors_death_adopts_what_lives_and_starts_what_does_not(own: Stack):
    own.up()
    eventually(lambda: set(COMPONENTS) <= set(own.pids()), what="all components")
    before = own.pids()
    own.kill("supervisor")
    own.kill("fleet")
    eventually(lambda: "supervisor" not in own.pids(), what="the supervisor's end")
    assert set(own.pids()) == set(COMPONENTS) - {"fleet"}
    own.up()
    eventually(lambda: "fleet" in own.pids(), what="the fleet")
    after = own.pids()
    assert {name: after[name] for name in ("gateway", "redis", "store")} == {
        name: before[name] for name in ("gateway", "redis", "store")
    }
    # Adopted components are no children, and are watched all the same.
    own.back("redis", own.kill("redis"))


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


def test_other_settings_for_a_running_home_are_refused(running: Stack):
    done = running.run("up", "--detach", "--port", str(free_port()), check=False)
    assert done.returncode == 1
    assert "edif-hpc down" in done.stderr
    assert answers(running.url)


def test_options_of_up_hold_for_restarted_components_and_other_commands(own: Stack):
    own.up("--isolation", "process")
    eventually(lambda: "gateway" in own.pids(), what="the gateway")
    own.back("gateway", own.kill("gateway"))
    eventually(lambda: answers(own.url), what="the gateway at its port")
    rows = {row["setting"]: row["value"] for row in own.json("config", "show")}
    assert rows["gateway.port"] == own.port
    assert rows["worker.isolation"] == "process"
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


def test_a_component_of_another_version_is_refused_naming_both(running: Stack, own: Stack):
    home = Home(running.home)
    path = home.run / "fleet.json"
    record = json.loads(path.read_text())
    try:
        path.write_text(json.dumps({**record, "version": "0.0.9"}))
        done = running.up(check=False)
    finally:
        path.write_text(json.dumps(record))
    assert done.returncode == 1
    assert "0.0.9" in done.stderr
    assert __version__ in done.stderr


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
        eventually(lambda: answers(own.url), what="the gateway")
        process.send_signal(how)
        assert process.wait(60) == 0
        output.seek(0)
        text = output.read()
    assert "Ctrl-C stops it" in text
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
    time.sleep(1.5)  # appendfsync everysec
    for name in ("store", "redis"):
        own.back(name, own.kill(name))

    def read() -> bool:
        try:
            return store.get("results/r/1") == b"kept" * 300_000
        except Unavailable:
            return False

    eventually(read, 60, "the object being there")
    assert "ada" in {row["user"] for row in own.json("keys", "list")}


def test_home_and_secrets_are_private(running: Stack):
    eventually(lambda: "store" in running.pids(), what="the store")
    assert stat.S_IMODE(running.home.stat().st_mode) == 0o700
    for path in running.home.rglob("*"):
        if path.parent == running.home and path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for path in (running.home / "secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    secrets = [path.read_text().strip() for path in (running.home / "secrets").iterdir() if "." not in path.name]
    assert len(secrets) >= 4
    for process in running.processes():
        told = " ".join([*process.cmdline(), *process.environ().values()])
        assert not any(secret in told for secret in secrets), process


def test_ps_shows_every_component(running: Stack):
    eventually(lambda: set(COMPONENTS) <= set(running.pids()), what="all components")
    rows = {row["name"]: row for row in running.json("ps")}
    assert rows["gateway"]["address"] == running.url
    assert all(row["memory_bytes"] > 0 for row in rows.values())
    assert "gateway" in running.run("ps").stdout


def test_keys_are_shown_once_and_can_be_revoked(running: Stack):
    made = json.loads(running.run("keys", "create", "grace", "--json").stdout)
    assert made["key"] not in running.run("keys", "list", "--json").stdout
    assert made["key"] not in "".join(
        path.read_text(errors="replace") for path in (running.home / "redis").rglob("*") if path.is_file()
    )
    running.run("keys", "revoke", made["name"])
    row = next(row for row in running.json("keys", "list") if row["name"] == made["name"])
    assert row["revoked"]
    assert running.run("keys", "revoke", "zzz", check=False).returncode == 1
    assert running.run("keys", "create", "no spaces", check=False).returncode == 1


def test_logs_of_components_and_of_nothing(running: Stack):
    assert "Ready to accept connections" in running.run("logs", "redis").stdout
    assert "serving" in running.run("logs", "fleet").stdout
    done = running.run("logs", "00000000-0000-0000-0000-000000000000", check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_requests_are_listed_and_unknown_ones_refused(running: Stack):
    assert running.json("requests", "list") == []
    for command in ("status", "cancel"):
        done = running.run(command, "0" * 32, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    assert running.url in running.run("status").stdout


def test_doctor_is_content_with_a_running_home(running: Stack):
    eventually(lambda: set(COMPONENTS) <= set(running.pids()), what="all components")
    findings = eventually(
        lambda: (
            found := json.loads(running.run("doctor", "--json", check=False).stdout)
        ) and all(finding["state"] != "failed" for finding in found) and found,
        90, "a doctor without failures",
    )  # fmt: skip
    assert {"edif-hpc", "home", "redis", "store", "gateway", "isolation", "clock", "disk"} <= {
        finding["subject"] for finding in findings
    }


def test_doctor_fails_on_a_home_that_is_down_and_says_what_to_do(own: Stack):
    Home(own.home).create()
    done = own.run("doctor", check=False)
    assert done.returncode == 1
    assert "edif-hpc up" in done.stdout


def test_redis_is_reached_with_the_password_alone(running: Stack):
    endpoint = redis_endpoint(Home(running.home), Settings())
    host, port = endpoint.url.removeprefix("redis://").removesuffix("/0").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"KEYS *\r\n")
        assert sock.recv(200).startswith(b"-NOAUTH")
