"""A home that is up: killed components, second thoughts, and every command that looks at it."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator

import pytest

from edif_hpc import __version__
from edif_hpc.core.endpoints import redis_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings
from tests.cli.stack import COMPONENTS, Stack, stack
from tests.support.servers import eventually, free_port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("running")) as made:
        made.up()
        yield made


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
    eventually(lambda: running.answers(), what="the gateway")
    assert "killed by SIGKILL" in (running.home / "logs" / "supervisor.log").read_text()


def test_other_settings_for_a_running_home_are_refused(running: Stack):
    done = running.run("up", "--detach", "--port", str(free_port()), check=False)
    assert done.returncode == 1
    assert "edif-hpc down" in done.stderr
    assert running.answers()


def test_a_component_of_another_version_is_refused_naming_both(running: Stack):
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
    unwritten = running.run("logs", "worker-none", check=False)
    assert unwritten.returncode == 1
    assert "no component of that name has written a log" in unwritten.stderr


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


def test_redis_is_reached_with_the_password_alone(running: Stack):
    endpoint = redis_endpoint(Home(running.home), Settings())
    host, port = endpoint.url.removeprefix("redis://").removesuffix("/0").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"KEYS *\r\n")
        assert sock.recv(200).startswith(b"-NOAUTH")
