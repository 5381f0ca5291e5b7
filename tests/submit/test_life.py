"""What becomes of a submitted script: it is watched, left alone, found again, ended, and outlives who submitted it."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edif_hpc.fleet import certificates
from tests.support.proxy import proxied
from tests.support.servers import eventually

from .laptop import Laptop

MODEL = """
import time
import edif_hpc
from nnsight import TransformersModel
model = TransformersModel("edif-test/gpt2", task="text-generation")
"""
ENDLESS = (
    MODEL
    + """
print("begun")
while True:
    pass
"""
)
IN_TIME = (
    MODEL
    + """
print("begun")
time.sleep(3)
edif_hpc.save("answer", 42)
print("ended")
"""
)


def until_begun(command: subprocess.Popen[str]) -> str:
    """Read on to the script's first line; returns the request's id."""
    assert command.stdout is not None
    request_id = command.stdout.readline().strip()
    assert len(request_id) == 32
    assert command.stdout.readline() == "begun\n"
    return request_id


def test_what_it_prints_comes_while_it_runs_and_cancelling_ends_it(laptop: Laptop) -> None:
    command = laptop.start("submit", laptop.write(ENDLESS), "--follow", "--name", "for ever", "--pool", "local")
    request_id = until_begun(command)
    shown = laptop.shown(request_id)
    assert (shown["status"], shown["name"], shown["kind"]) == ("RUNNING", "for ever", "script")
    assert "for ever" in laptop.run("requests", "list").stdout
    unready = laptop.run("result", request_id)
    assert unready.returncode == 1
    assert "has no result yet" in unready.stderr
    assert laptop.run("cancel", request_id).returncode == 0
    _, words = command.communicate(timeout=60)
    assert command.returncode == 3
    assert words.rstrip().endswith("Cancelled.")
    assert laptop.shown(request_id)["status"] == "ERROR"
    assert laptop.prints(MODEL + "print('the next one')") == ["the next one"]


def test_it_outlives_the_terminal_that_it_came_from(laptop: Laptop) -> None:
    command = laptop.start("submit", laptop.write(IN_TIME), "--follow", "--form", "json")
    request_id = until_begun(command)
    os.killpg(command.pid, signal.SIGHUP)
    command.communicate(timeout=60)
    assert command.returncode == -signal.SIGHUP
    assert laptop.shown(request_id)["status"] == "RUNNING"
    followed = laptop.run("logs", "-f", request_id)
    assert followed.returncode == 0
    assert "COMPLETED" in followed.stdout.splitlines()[-1]
    assert any(line.endswith("LOG          ended") for line in followed.stdout.splitlines())
    assert laptop.run("result", request_id).returncode == 0
    assert json.loads((laptop.folder / f"{request_id}.json").read_text()) == {"answer": 42}
    other = laptop.run("result", request_id, "--out", "answer.npz")
    assert other.returncode == 1
    assert "This result is a .json file" in other.stderr


def test_ctrl_c_leaves_the_request_and_says_how_to_find_it(laptop: Laptop) -> None:
    command = laptop.start("submit", laptop.write(IN_TIME), "--follow")
    request_id = until_begun(command)
    command.send_signal(signal.SIGINT)
    _, words = command.communicate(timeout=60)
    assert command.returncode == 130
    assert f"edif-hpc logs -f {request_id}" in words
    eventually(lambda: laptop.shown(request_id)["status"] == "COMPLETED", what="the end of the request")


def test_without_waiting_the_id_is_all_that_is_printed(laptop: Laptop) -> None:
    done = laptop.run("submit", laptop.write(MODEL))
    assert done.returncode == 0
    assert done.stderr == ""
    request_id = done.stdout.strip()
    eventually(lambda: laptop.shown(request_id)["status"] == "COMPLETED", what="the end of the request")


def test_a_failed_script_is_tried_again_with_the_same_payload(laptop: Laptop) -> None:
    done = laptop.submit(MODEL + "import sys; print(sys.argv[1]); sys.exit(1)", "--", "an argument", code=3)
    request_id = done.stdout.split()[0]
    again = json.loads(laptop.run("requests", "retry", request_id, "--json").stdout)["id"]
    followed = laptop.run("logs", "-f", again).stdout
    assert "an argument" in followed
    assert "exit code 1" in followed


def test_its_own_time_limit_ends_it(laptop: Laptop) -> None:
    done = laptop.submit(ENDLESS, "--time", "0:00:02", code=3)
    assert "ran longer than its time limit of 2 s" in done.stderr


def test_waiting_goes_on_through_a_line_that_is_cut(laptop: Laptop) -> None:
    with proxied(laptop.url) as between:
        laptop.url = between.url
        command = laptop.start("submit", laptop.write(IN_TIME), "--follow", "--out", "answer.json")
        until_begun(command)
        with between.cut_off():
            seen = between.counters.connections
        eventually(lambda: between.counters.connections > seen, what="another connection")
        rest, words = command.communicate(timeout=60)
        assert command.returncode == 0, words
        assert rest == "ended\n"
        assert json.loads((laptop.folder / "answer.json").read_text()) == {"answer": 42}


def test_a_submission_whose_answer_is_lost_is_there_once(laptop: Laptop) -> None:
    before = json.loads(laptop.run("requests", "list", "--json").stdout)
    with proxied(laptop.url) as between:
        between.cut_after(1)
        direct, laptop.url = laptop.url, between.url
        done = laptop.run("submit", laptop.write(MODEL))
        assert between.counters.connections == 2
        laptop.url = direct
    assert done.returncode == 0, done.stderr
    after = json.loads(laptop.run("requests", "list", "--json").stdout)
    assert {row["id"] for row in after} - {row["id"] for row in before} == {done.stdout.strip()}


@pytest.mark.parametrize("told", [b"x-forwarded-proto: https\r\n", b""], ids=["told", "untold"])
def test_over_https_with_a_key_and_no_home(laptop: Laptop, tmp_path: Path, told: bytes) -> None:
    """Whether the front says so to the gateway, whose links it else makes http://, or not."""
    with over_tls(laptop.url, tmp_path / "tls", told) as (url, authority):
        laptop.url, laptop.variables = url, {"SSL_CERT_FILE": str(authority)}
        done = laptop.submit(IN_TIME, "--out", "answer.json")
        assert done.stdout.splitlines()[1:] == ["begun", "ended"]
        assert json.loads((laptop.folder / "answer.json").read_text()) == {"answer": 42}
        laptop.variables = {}
        untrusted = laptop.run("submit", laptop.write(MODEL))
        assert untrusted.returncode == 4
        assert "CERTIFICATE_VERIFY_FAILED" in untrusted.stderr
        assert "have SSL_CERT_FILE name the authority" in untrusted.stderr


@contextmanager
def over_tls(url: str, folder: Path, told: bytes) -> Iterator[tuple[str, Path]]:
    """The service behind a TLS front, as nginx is one; its address by this machine's name, and who signed for it.

    `told` is the header that it adds to the first request of a connection.
    """
    folder.mkdir()
    name, port = socket.gethostname(), int(url.rpartition(":")[2])
    files = certificates.ensure(folder, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with socket.create_server((socket.gethostbyname(name), 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listening.accept()
                except OSError:  # closed: the test is over
                    return
                threading.Thread(target=one, args=(raw,), daemon=True).start()

        def one(raw: socket.socket) -> None:
            try:
                near, far = context.wrap_socket(raw, server_side=True), socket.create_connection(("127.0.0.1", port))
            except (OSError, ssl.SSLError):  # a client that does not trust us
                raw.close()
                return
            threading.Thread(target=passed, args=(far, near, b""), daemon=True).start()
            passed(near, far, told)

        def passed(source: socket.socket, target: socket.socket, header: bytes) -> None:
            try:
                while data := source.recv(65536):
                    line, ended, rest = data.partition(b"\r\n") if header else (data, b"", b"")
                    target.sendall(line + ended + header + rest)
                    header = b""
            except OSError:  # either side is gone, and the other learns of it
                pass
            target.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"https://{name}:{listening.getsockname()[1]}", files.authority
        listening.shutdown(socket.SHUT_RDWR)
