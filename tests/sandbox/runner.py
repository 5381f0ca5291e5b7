"""Runs every attempt of the table in a freshly forked executor, under several identities, and prints what happened.

A program of its own: forks belong into a process with one thread and no test framework in it. It imports torch and the
model once and forks from there, as a zygote does. Prints one JSON object: identity -> level -> attempt -> outcome.

Identities: `root` keeps uid 0 without capabilities, `dropped` is root that lets `enter` change the uid, `ordinary`
never had any rights. Run by an ordinary user, only `ordinary` exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.sandbox import Policy, enter, probe
from edif_hpc.worker.sandbox.kernel import PR_SET_DUMPABLE, prctl
from tests.sandbox import attempts
from tests.sandbox.attempts import MIB, REFUSED, SECRET, WORKS, Attempt, Ground

SECONDS = 60
PERMISSION_ERRNOS = (errno.EPERM, errno.EACCES)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hub", help="a hub cache with the tiny GPT-2: run the attempts with torch instead")
    parser.add_argument("--identity", action="append", required=True)
    asked = parser.parse_args()
    table = dict(attempts.TABLE)
    if asked.hub:
        from tests.sandbox import heavy

        heavy.prepare(asked.hub)
        table = dict(heavy.TABLE)
    print(json.dumps({identity: as_identity(identity, table) for identity in asked.identity}))


def as_identity(identity: str, table: dict[str, Attempt]) -> dict[str, Any]:
    """Fork a child that takes the identity on and does the rest, so that the next one starts afresh."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            if identity == "ordinary" and os.geteuid() == 0:
                # A uid of its own per run, so that RLIMIT_NPROC counts no one else's processes.
                uid = random.randrange(1_900_000_000, 1_999_000_000)
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                prctl(PR_SET_DUMPABLE, 1)  # as for any process of an ordinary user; a change of uid switches it off
                probe.cache_clear()
            outcomes = {
                level.value: at_level(level, identity, table) for level in (Isolation.PROCESS, Isolation.LOCKED)
            }
            _write_all(writer, json.dumps(outcomes).encode())
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.wait()
    return dict(json.loads(said))


def at_level(level: Isolation, identity: str, table: dict[str, Attempt]) -> dict[str, str]:
    probe()
    victim = subprocess.Popen(["/bin/sleep", "1000"], env={"TOKEN": SECRET})
    try:
        return {name: one(level, identity, entry, victim.pid) for name, entry in table.items()}
    finally:
        victim.kill()
        victim.wait()


def one(level: Isolation, identity: str, entry: Attempt, victim: int) -> str:
    """Lay out fresh ground, fork an executor, let it try, and say what came of it."""
    with tempfile.TemporaryDirectory(prefix="edif-sandbox-", ignore_cleanup_errors=True) as folder:
        home, scratch, granted = (Path(folder, name) for name in ("home", "scratch", "granted"))
        for path in (home, scratch, granted):
            path.mkdir(mode=0o700)
        Path(folder).chmod(0o711)
        granted.chmod(0o755)
        (home / "secret").write_text(SECRET)
        (granted / "public").write_text("public")
        (granted / "link").symlink_to(home / "secret")
        tcp = socket.create_server(("127.0.0.1", 0))
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        unix.bind(str(home / "socket"))
        abstract.bind(f"\0{folder}")
        for listener in (unix, abstract):
            listener.listen()
        ours, theirs = socket.socketpair()
        ours.sendall(b"world")
        reader, report = os.pipe()
        ground = Ground(
            home=str(home),
            scratch=str(scratch),
            readable=str(granted / "public"),
            tcp=tcp.getsockname()[1],
            unix=str(home / "socket"),
            abstract=folder,
            victim=victim,
            parent=os.getpid(),
        )
        policy = Policy(
            level=level,
            scratch=scratch,
            read_only=(granted,),
            memory_bytes=2000 * MIB,
            cpu_seconds=1 if entry.process == "SIGXCPU" else 50,
            file_bytes=4 * MIB,
            processes=60 if "without_end" in entry.run.__name__ else 1000,
            open_files=100,
            parent=os.getpid(),
            change_uid=identity == "dropped",
        )
        readonly = os.open(home / "secret", os.O_RDONLY)
        try:
            pid = os.fork()
            if pid == 0:
                _executor(dataclasses.replace(policy, keep_fds=(report, readonly, theirs.fileno())), entry, ground)
            os.close(report)
            return _outcome(pid, reader)
        finally:
            for fd in (reader, readonly):
                os.close(fd)
            for end in (tcp, unix, abstract, ours, theirs):
                end.close()


def _executor(policy: Policy, entry: Attempt, ground: Ground) -> None:
    said = "could not enter"
    report = policy.keep_fds[0]
    try:
        reached = enter(policy, probe())
        assert reached is policy.level
        report = attempts.REPORT
        try:
            entry.run(ground)
            said = WORKS
        except OSError as error:
            said = REFUSED if error.errno in PERMISSION_ERRNOS else f"OSError {os.strerror(error.errno or 0)}"
        except BaseException as error:  # noqa: BLE001 - whatever an attempt raises is its outcome
            said = f"{type(error).__name__} {error}"
    except BaseException as error:  # noqa: BLE001 - reported, and told from an attempt's
        said = f"could not enter: {error!r}"
    finally:
        os.write(report, said[:3000].encode())
        os._exit(0)


def _outcome(pid: int, reader: int) -> str:
    deadline = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung"
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 4000).decode() or "nothing"
    except BlockingIOError:  # a child of the executor still holds the pipe
        return "nothing"


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
