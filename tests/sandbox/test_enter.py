"""How a process enters: the order of descriptors, the death of its host, and refusals. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edif_hpc.worker.sandbox import probe

REPO = Path(__file__).resolve().parents[2]
ROOT = os.geteuid() == 0
pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(probe().level.value != "locked", reason="; ".join(probe().reasons)),
]


def script(source: str, *arguments: str) -> str:
    prelude = """
        import os, sys, time, socket, select
        from pathlib import Path
        from edif_hpc.core.isolation import Isolation
        from edif_hpc.worker.sandbox import Policy, SandboxError, enter, probe
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(prelude) + textwrap.dedent(source), *arguments],
        cwd=REPO,
        capture_output=True,
        timeout=60,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_descriptors_keep_their_order_wherever_they_come_from() -> None:
    # The reporting pipe stands on 0, others stand on the targets of each other, /dev/null must overwrite none.
    out = script("""
        ends = [os.pipe() for _ in range(4)]
        places = [0, 5, 3, 4]
        spare = [os.dup2(os.dup(w), 100 + i) for i, (_, w) in enumerate(ends)]
        readers = [os.dup2(r, 200 + i) for i, (r, _) in enumerate(ends)]
        if os.fork() == 0:
            for i, place in enumerate(places):
                os.dup2(100 + i, place)
            enter(Policy(keep_fds=tuple(places)), probe())
            for i in range(4):
                os.write(3 + i, str(i).encode())
            os._exit(0)
        os.wait()
        print([os.read(r, 10).decode() for r in readers])
    """)
    assert out.strip() == "['0', '1', '2', '3']"


@pytest.mark.parametrize("change_uid", [False, True] if ROOT else [False])
def test_it_dies_with_its_host_even_after_a_change_of_uid(change_uid: bool) -> None:
    out = script(
        """
        reader, writer = os.pipe()
        if os.fork() == 0:
            ready_r, ready_w = os.pipe()
            host = os.getpid()
            if os.fork() == 0:
                enter(Policy(keep_fds=(writer, ready_w), parent=host, change_uid=sys.argv[1] == "True"), probe())
                os.write(4, b"x")
                time.sleep(1000)
            os.read(ready_r, 1)
            os._exit(0)
        os.close(writer)
        gone = select.select([reader], [], [], 20)[0]
        print("gone" if gone and os.read(reader, 1) == b"" else "still there")
        """,
        str(change_uid),
    )
    assert out.strip() == "gone"


def test_a_parent_that_died_before_is_noticed() -> None:
    out = script("""
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                enter(Policy(parent=1 if os.getppid() != 1 else 2, keep_fds=(writer,)), probe())
                os.write(3, b"entered")
            except SandboxError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.wait()
        print(os.read(reader, 1000).decode())
    """)
    assert "was gone before" in out


def test_a_second_thread_is_refused_because_landlock_would_not_hold_it() -> None:
    out = script("""
        import threading
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            enter(Policy(), probe())
        except SandboxError as error:
            print(error)
        stop.set()
    """)
    assert out.startswith("Isolation must be entered with one thread")


def test_without_a_scratch_there_is_no_writable_place() -> None:
    out = script("""
        import tempfile
        tempfile.gettempdir()
        reader, writer = os.pipe()
        if os.fork() == 0:
            enter(Policy(keep_fds=(writer,)), probe())
            said = []
            for folder in ("/", "/tmp", "/dev/shm", "/var/tmp", "/run", "/proc/self"):
                try:
                    (Path(folder) / "comm").write_text("x")
                    said.append(f"wrote {folder}")
                except PermissionError:
                    pass
            try:
                tempfile.TemporaryFile()
                said.append("a temporary file")
            except PermissionError:
                pass
            os.write(3, repr(said).encode())
            os._exit(0)
        os.wait()
        print(os.read(reader, 1000).decode())
    """)
    assert out.strip() == "[]"


@pytest.mark.skipif(not ROOT, reason="only root changes its uid")
def test_root_becomes_nobody_that_exists_and_owns_its_scratch(tmp_path: Path) -> None:
    out = script("""
        import tempfile
        with tempfile.TemporaryDirectory(prefix="edif-") as folder:
            os.chmod(folder, 0o711)
            scratch = Path(folder, "scratch")
            scratch.mkdir(mode=0o700)
            reader, writer = os.pipe()
            if os.fork() == 0:
                enter(Policy(scratch=scratch, keep_fds=(writer,)), probe())
                (scratch / "file").write_text("x")
                caps = [l.split()[1] for l in Path("/proc/self/status").read_text().splitlines() if l[:3] == "Cap"][:3]
                os.write(3, f"{os.getresuid()} {os.getresgid()} {os.getgroups()} {caps}".encode())
                os._exit(0)
            os.wait()
            print(os.read(reader, 1000).decode())
    """)
    assert "(0," not in out
    assert out.count("20000") == 6
    assert "[] ['0000000000000000', '0000000000000000', '0000000000000000']" in out


@pytest.mark.skipif(not ROOT, reason="only root changes its uid")
def test_a_scratch_that_the_new_uid_cannot_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    out = script(
        """
        try:
            enter(Policy(scratch=Path(sys.argv[1])), probe())
        except SandboxError as error:
            print(error)
        """,
        str(tmp_path / "scratch"),
    )
    assert "which an unprivileged uid cannot enter" in out


def test_with_devices_memory_is_still_bounded() -> None:
    # No accelerator here: /dev/zero stands for one, to see that RLIMIT_DATA takes RLIMIT_AS's place.
    out = script("""
        reader, writer = os.pipe()
        if os.fork() == 0:
            policy = Policy(keep_fds=(writer,), devices=(Path("/dev/zero"),), memory_bytes=200 * 1024 * 1024)
            enter(policy, probe())
            try:
                bytearray(400 * 1024 * 1024)
                os.write(3, b"allocated")
            except MemoryError:
                with open("/dev/zero", "r+b", buffering=0) as device:
                    os.write(3, b"bounded" + device.read(1).replace(bytes(1), b" and open"))
            os._exit(0)
        os.wait()
        print(os.read(reader, 1000).decode())
    """)
    assert out.strip() == "bounded and open"
