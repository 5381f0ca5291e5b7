"""The embedded servers at an address that other machines reach: what may be had there, by whom, and who is believed.

Real servers, at a real second address of this machine.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import ResponseError

from edif_hpc.core.endpoints import Role, store_endpoint
from edif_hpc.core.errors import SettingsError, Unavailable
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings, load
from edif_hpc.core.store import Store, payload_key
from edif_hpc.fleet import ahead, certificates, network
from tests.support import models
from tests.support.servers import eventually
from tests.support.stack import Stack, client_of

from .reaching import in_redis, of, ports_of

pytestmark = pytest.mark.xdist_group("network")
SERVED_OUTSIDE = {"redis", "store", "store_grpc"}


# -- what is refused before anything starts ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["0.0.0.0", "::", "127.0.0.1", "::1", "login1:6379", "https://login1", "a b"])
def test_an_address_must_be_one_machines_own(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'[network]\naddress = "{wrong}"\n')
    with pytest.raises(SettingsError, match=r"network\.address"):
        load(file)


@pytest.mark.parametrize(
    ("name", "told"),
    [("localhost", "a loopback"), ("no-such-host.invalid", "does not resolve"), ("203.0.113.7", "no such address")],
)
def test_an_address_must_be_this_machines(name: str, told: str) -> None:
    with pytest.raises(SettingsError, match=rf"^network\.address .*{told}.*set network\.address to"):
        network.interface(name)


def test_a_slurm_pool_needs_an_address_unless_nothing_is_embedded() -> None:
    pools = [Pool(name="here", launcher="local"), Pool(name="there")]
    with pytest.raises(SettingsError, match=r"pool there .*set network\.address"):
        network.refuse_loopback(Settings(pool=pools))
    network.refuse_loopback(Settings(pool=pools[:1]))
    external = {"redis": {"url": "rediss://r:6379/0"}, "store": {"endpoint": "https://s3"}}
    network.refuse_loopback(Settings(pool=pools, **external))


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("redis.url", "redis://127.0.0.1:6379/0"), ("redis.url", "unix:///run/redis.sock"),
        ("store.endpoint", "http://localhost:9000"), ("store.endpoint", "http://[::1]:9000"),
    ],
)  # fmt: skip
def test_external_servers_of_a_slurm_pool_must_be_reached_from_elsewhere(key: str, url: str) -> None:
    external = {"redis": {"url": "rediss://r:6379/0"}, "store": {"endpoint": "https://s3"}}
    section, name = key.split(".")
    external[section][name] = url
    with pytest.raises(SettingsError, match=rf"pool there .*do not reach {key} = "):
        network.refuse_loopback(Settings(pool=[Pool(name="there")], **external))
    network.refuse_loopback(Settings(pool=[Pool(name="here", launcher="local")], **external))


def test_no_proxy_leads_to_where_workers_meet() -> None:
    external = {"redis": {"url": "rediss://cache.site:6379/0"}, "store": {"endpoint": "https://s3.site"}}
    settings = Settings(network={"address": "login1.site"}, **external)
    assert network.meeting_points(settings) == ["login1.site", "cache.site", "s3.site"]
    assert network.meeting_points(Settings()) == []


def test_up_says_which_external_server_does_not_answer(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "edif-hpc.toml").write_text('[redis]\nurl = "redis://127.0.0.1:9/0"\n')
    done = Stack(home, "").cli("up", "--detach", check=False)
    assert done.returncode == 1
    assert "redis://127.0.0.1:9/0, which redis.url names, does not let this service in" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_image_that_is_missing_is_refused_where_that_can_be_seen(tmp_path: Path) -> None:
    there = Pool(name="there", image=str(tmp_path / "worker.sif"))
    with pytest.raises(SettingsError, match=r"which pool\.there\.image names"):
        ahead.refuse_missing_images(Settings(pool=[there]))
    (tmp_path / "worker.sif").touch()
    ahead.refuse_missing_images(Settings(pool=[there, Pool(name="elsewhere", image="/on/compute/nodes/worker.sif")]))


def test_up_refuses_loopback_for_a_slurm_pool(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "edif-hpc.toml").write_text('[[pool]]\nname = "there"\n')
    done = Stack(home, "").cli("up", "--detach", check=False)
    assert done.returncode == 1
    assert "network.address" in done.stderr
    assert done.stderr.count("\n") == 1


def test_certificates_are_made_anew_for_another_address(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    first = certificates.ensure(home.secrets)
    authority = first.authority.read_bytes()
    assert certificates.ensure(home.secrets).authority.read_bytes() == authority
    for name in ("login1", "192.0.2.9", "fd00::9"):
        again = certificates.ensure(home.secrets, name)
        assert set(certificates.names_of(again.certificate)) == {"localhost", "127.0.0.1", name}
        assert again.authority.read_bytes() != authority
        authority = again.authority.read_bytes()
        assert certificates.ensure(home.secrets, name).authority.read_bytes() == authority
        strict = ssl.create_default_context(cafile=str(again.authority))
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        _handshake(again, strict, name)


def _handshake(served: certificates.Files, client: ssl.SSLContext, name: str) -> None:
    """TLS between two contexts in memory."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served.certificate, served.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=name), context.wrap_bio(there, back, server_side=True)]
    for _ in range(3):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert all(end.version() for end in ends)


# -- what listens where -----------------------------------------------------------------------------------------------


def listening(stack: Stack) -> set[tuple[str, int]]:
    """Every address and port that any process of this home listens on."""
    found = set()
    for path in (stack.home / "run").glob("*.json"):
        record = json.loads(path.read_text())
        if "pid" not in record:
            continue
        process = psutil.Process(record["pid"])
        for each in (process, *process.children(recursive=True)):
            found |= {
                (connection.laddr.ip, connection.laddr.port)
                for connection in each.net_connections(kind="tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    return found


def test_only_redis_and_s3_listen_at_the_address(reached: Stack, address: str) -> None:
    ports = ports_of(reached)
    found = listening(reached)
    assert {ip for ip, _ in found} == {"127.0.0.1", address}
    assert {port for ip, port in found if ip == address} == {ports[name] for name in SERVED_OUTSIDE}
    for name in ports.keys() - SERVED_OUTSIDE:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, ports[name]), timeout=5)


def talk(sock: socket.socket, said: bytes) -> bytes:
    """What is answered; nothing when the connection is closed or nothing comes."""
    try:
        sock.sendall(said)
        return sock.recv(1024)
    except (ConnectionError, TimeoutError, ssl.SSLError):
        return b""


@pytest.mark.parametrize("name", sorted(SERVED_OUTSIDE))
def test_nothing_is_said_in_plain_text_at_the_address(reached: Stack, address: str, name: str) -> None:
    for said in (b"PING\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)):
        with socket.create_connection((address, ports_of(reached)[name]), timeout=5) as plain:
            answer = talk(plain, said)
        # A TLS alert, or S3's word that this is an HTTPS server.
        assert answer[:1] in (b"", b"\x15") or b" 400 " in answer.split(b"\r\n")[0]


def trusting_nobody() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_redis_says_nothing_without_a_password(reached: Stack, address: str) -> None:
    for command in (b"KEYS *", b"GET x", b"CONFIG GET *", b"INFO", b"SUBSCRIBE x", b"AUTH wrong", b"HELLO 3"):
        with (
            socket.create_connection((address, ports_of(reached)["redis"]), timeout=5) as raw,
            trusting_nobody().wrap_socket(raw) as wrapped,
        ):
            assert talk(wrapped, command + b"\r\n").startswith((b"-NOAUTH", b"-WRONGPASS", b"-ERR")), command


def test_s3_gives_and_takes_nothing_without_a_signature(reached: Stack, address: str) -> None:
    Store(of(reached, store_endpoint)).put(payload_key("hidden"), b"hidden-content")
    with httpx.Client(verify=False, timeout=5, trust_env=False) as client:
        base = f"https://{address}:{ports_of(reached)['store']}"
        for path in ("/", "/edif-hpc/?list-type=2", f"/edif-hpc/{payload_key('hidden')}", "/status", "/metrics", "/ui"):
            assert b"hidden-content" not in client.get(base + path).content
        for path in ("/edif-hpc/results/mine", "/newbucket"):
            assert client.put(base + path, content=b"x").status_code >= 400


def test_the_stores_grpc_wants_a_client_certificate(reached: Stack, address: str) -> None:
    context = trusting_nobody()
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((address, ports_of(reached)["store_grpc"]), timeout=5) as raw:
        try:
            with context.wrap_socket(raw) as wrapped:
                answer = talk(wrapped, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        except (ssl.SSLError, ConnectionError):
            return
    assert answer == b""


# -- who is believed --------------------------------------------------------------------------------------------------


def test_a_worker_believes_only_the_homes_authority(reached: Stack, tmp_path: Path) -> None:
    other = Home(tmp_path / "other").create()
    stranger = str(certificates.ensure(other.secrets, "192.0.2.99").authority)
    assert in_redis(reached, Role.WORKER, lambda redis: redis.ping())
    for changed in ({"authority": stranger}, {"authority": ""}):
        with pytest.raises(ConnectionLost, match="CERTIFICATE_VERIFY_FAILED"):
            in_redis(reached, Role.WORKER, lambda redis: redis.ping(), **changed)
        endpoint = replace(of(reached, store_endpoint, Role.WORKER), **changed)
        with pytest.raises(Unavailable, match="SSL validation failed"):
            Store(endpoint).get(payload_key("any"))


def test_a_certificate_for_another_address_is_refused(reached: Stack, address: str) -> None:
    """Whoever has the home's certificate cannot be taken for another machine: the name is checked too."""
    home = Home(reached.home)
    context = ssl.create_default_context(cafile=str(home.secrets / "authority.pem"))
    for host, believed in ((address, True), ("login2.example", False)):
        with socket.create_connection((address, ports_of(reached)["redis"]), timeout=5) as raw:
            if believed:
                context.wrap_socket(raw, server_hostname=host).close()
            else:
                with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                    context.wrap_socket(raw, server_hostname=host)


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_a_worker_at_the_address_serves_a_request(
    reached: Stack, address: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    import torch
    from nnsight import TransformersModel

    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):  # put back afterwards, for tests that look at a hub
        monkeypatch.setenv(name, "")
        monkeypatch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))
    monkeypatch.setenv("HF_HOME", "")
    models.offline_client(cache)
    model: Any = TransformersModel(models.repo_id("gpt2"), task=models.task("gpt2"))
    with client_of(reached), model.trace("The Eiffel Tower", remote=True):
        far = model.lm_head.output.save()
    with model.trace("The Eiffel Tower"):
        near = model.lm_head.output.save()
    assert torch.equal(far, near)
    ports = ports_of(reached)
    (record,) = (reached.home / "run").glob("worker-*.json")
    found = {
        (connection.raddr.ip, connection.raddr.port)
        for connection in psutil.Process(json.loads(record.read_text())["pid"]).net_connections(kind="tcp")
        if connection.raddr and connection.status == psutil.CONN_ESTABLISHED
    }
    assert (address, ports["redis"]) in found
    assert {ip for ip, port in found if port in ports.values()} == {address}


def test_doctor_and_ps_tell_the_address(reached: Stack, address: str) -> None:
    findings = {found["subject"]: found for found in json.loads(reached.cli("doctor", "--json", check=False).stdout)}
    assert findings["network"]["state"] == "ok"
    assert address in findings["network"]["found"]
    assert findings["redis"]["state"] == findings["store"]["state"] == "ok"
    rows = {row["name"]: row["address"] for row in reached.json("ps")}
    assert urlsplit(rows["relay"]).netloc == f"{address}:{ports_of(reached)['redis']}"
    assert urlsplit(rows["store"]).netloc == f"{address}:{ports_of(reached)['store']}"


def test_the_relay_comes_back_when_redis_was_killed_and_when_it_was_killed(reached: Stack) -> None:
    """Where workers know it: those in allocations read the port once."""
    port = ports_of(reached)["redis"]
    for name in ("redis", "relay"):
        pid = json.loads((reached.home / "run" / f"{name}.json").read_text())["pid"]
        os.kill(pid, 9)

        def answers() -> bool:
            try:
                return bool(in_redis(reached, Role.WORKER, lambda redis: redis.ping()))
            except (ConnectionLost, OSError, ResponseError):
                return False

        eventually(answers, 30, f"Redis at the address after the {name} was killed")
        assert ports_of(reached)["redis"] == port


def test_a_running_home_is_not_given_another_address(reached: Stack) -> None:
    file = reached.home / "edif-hpc.toml"
    before = file.read_text()
    try:
        file.write_text(re.sub(r'address = ".*"', 'address = ""', before))
        done = reached.cli("up", "--detach", check=False)
        assert done.returncode == 1
        assert "network.address" in done.stderr
        assert "edif-hpc down" in done.stderr
    finally:
        file.write_text(before)
