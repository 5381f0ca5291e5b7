"""One forbidden or honest thing each, and what becomes of it at each level: the table that the sandbox is held to.

An attempt is a function of the `Ground` it stands on; it runs in a forked child that entered the sandbox. Its outcome
is `works` (it returned), `refused` (OSError with a permission's errno, or nothing there to open), the name of another
exception, or the signal that killed the process.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.worker.sandbox.kernel import libc

SECRET = "a-secret-of-the-host"
WORKS, REFUSED = "works", "refused"
ANY = "any"
"""Another setting of the machine decides (Yama's ptrace_scope)."""
# Where the executor finds what it was let keep, in the order of Policy.keep_fds.
REPORT, READONLY_FILE, PEER = 3, 4, 5
MIB = 1024 * 1024


@dataclass(frozen=True)
class Ground:
    """What the parent laid out, under the uid that the executor had when it was forked."""

    home: str
    scratch: str
    readable: str
    tcp: int
    unix: str
    abstract: str
    victim: int
    parent: int


@dataclass(frozen=True)
class Attempt:
    run: Callable[[Ground], object]
    process: str
    locked: str


TABLE: dict[str, Attempt] = {}


def attempt(process: str, locked: str) -> Callable[[Callable[[Ground], object]], Callable[[Ground], object]]:
    """Enter a function into the table with its outcome at each level."""

    def enter(function: Callable[[Ground], object]) -> Callable[[Ground], object]:
        TABLE[function.__name__] = Attempt(function, process, locked)
        return function

    return enter


def call(name: str, *arguments: object) -> int:
    """A function of libc that Python does not offer; raises OSError."""
    function = getattr(libc(), name)
    function.restype = ctypes.c_int
    result = int(function(*arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


# Files


@attempt(WORKS, REFUSED)
def read_a_file_in_the_home(g: Ground) -> object:
    return Path(g.home, "secret").read_text()


@attempt(WORKS, REFUSED)
def read_etc_passwd(g: Ground) -> object:
    return Path("/etc/passwd").read_text()


@attempt(WORKS, REFUSED)
def list_the_root(g: Ground) -> object:
    return os.listdir("/")


@attempt(WORKS, REFUSED)
def list_the_home(g: Ground) -> object:
    return os.listdir(g.home)


@attempt(WORKS, REFUSED)
def write_in_the_home(g: Ground) -> object:
    return Path(g.home, "planted").write_text("x")


@attempt(WORKS, REFUSED)
def write_in_tmp(g: Ground) -> object:
    return tempfile.TemporaryFile(dir="/tmp").close()


@attempt(WORKS, REFUSED)
def write_in_dev_shm(g: Ground) -> object:
    return tempfile.TemporaryFile(dir="/dev/shm").close()


@attempt(WORKS, REFUSED)
def append_to_a_readable_file(g: Ground) -> object:
    return os.close(os.open(g.readable, os.O_WRONLY | os.O_APPEND))


@attempt(WORKS, REFUSED)
def empty_a_readable_file_by_opening_it(g: Ground) -> object:
    return os.close(os.open(g.readable, os.O_RDONLY | os.O_TRUNC))


@attempt(WORKS, REFUSED)
def open_for_ioctl_alone(g: Ground) -> object:
    return os.close(os.open(Path(g.home, "secret"), 3))


@attempt(WORKS, REFUSED)
def truncate_by_path(g: Ground) -> object:
    return os.truncate(Path(g.home, "secret"), 0)


@attempt(WORKS, REFUSED)
def reach_the_home_through_a_symlink(g: Ground) -> object:
    os.symlink(Path(g.home, "secret"), Path(g.scratch, "link"))
    return Path(g.scratch, "link").read_text()


@attempt(WORKS, REFUSED)
def reach_the_home_through_a_symlink_that_is_there(g: Ground) -> object:
    return Path(g.readable).with_name("link").read_text()


@attempt(WORKS, REFUSED)
def reach_the_home_through_proc_self_root(g: Ground) -> object:
    return Path(f"/proc/self/root{g.home}/secret").read_text()


@attempt(WORKS, REFUSED)
def reach_the_home_through_an_o_path_descriptor(g: Ground) -> object:
    fd = os.open(g.home, os.O_PATH)
    return os.close(os.open("secret", os.O_RDONLY, dir_fd=fd))


@attempt(WORKS, REFUSED)
def reopen_a_kept_descriptor_for_writing(g: Ground) -> object:
    return os.close(os.open(f"/proc/self/fd/{READONLY_FILE}", os.O_RDWR))


@attempt(WORKS, REFUSED)
def hard_link_into_scratch(g: Ground) -> object:
    return os.link(Path(g.home, "secret"), Path(g.scratch, "hard"))


@attempt(WORKS, REFUSED)
def chmod(g: Ground) -> object:
    return os.chmod(g.home, 0o755)


@attempt(WORKS, REFUSED)
def fchmod_a_kept_descriptor(g: Ground) -> object:
    return os.fchmod(READONLY_FILE, 0o600)


@attempt(WORKS, REFUSED)
def set_times(g: Ground) -> object:
    return os.utime(g.readable)


@attempt(WORKS, REFUSED)
def lock_a_readable_file(g: Ground) -> object:
    with open(g.readable) as file:
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@attempt(WORKS, REFUSED)
def make_a_fifo_in_scratch(g: Ground) -> object:
    return os.mkfifo(Path(g.scratch, "fifo"))


@attempt(WORKS, REFUSED)
def watch_a_folder(g: Ground) -> object:
    return os.close(call("inotify_init1", 0))


@attempt(WORKS, WORKS)  # a hole that is told of: Landlock cannot restrict stat and readlink
def see_that_a_file_exists(g: Ground) -> object:
    return os.stat(g.home).st_mtime


# Other processes


@attempt(WORKS, REFUSED)
def fork(g: Ground) -> object:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attempt(WORKS, REFUSED)
def run_a_program(g: Ground) -> object:
    return subprocess.run(["/bin/true"], check=True)


@attempt(WORKS, REFUSED)
def spawn_a_program(g: Ground) -> object:
    return os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


@attempt("nothing", REFUSED)
def become_a_program(g: Ground) -> object:
    return os.execv("/bin/true", ["true"])


@attempt(WORKS, REFUSED)
def signal_the_parent(g: Ground) -> object:
    return os.kill(g.parent, 0)


@attempt(WORKS, REFUSED)
def signal_another_process(g: Ground) -> object:
    return os.kill(g.victim, signal.SIGCONT)


@attempt(WORKS, REFUSED)
def signal_every_process(g: Ground) -> object:
    return os.kill(-1, 0)


@attempt(WORKS, REFUSED)
def signal_through_a_descriptor(g: Ground) -> object:
    return signal.pidfd_send_signal(os.pidfd_open(g.victim), signal.SIGCONT)


@attempt(WORKS, REFUSED)
def have_the_kernel_signal_another_process(g: Ground) -> object:
    fcntl.fcntl(PEER, fcntl.F_SETOWN, g.victim)
    return fcntl.fcntl(PEER, 10, signal.SIGCONT)  # F_SETSIG


@attempt(ANY, REFUSED)
def trace_another_process(g: Ground) -> object:
    null = ctypes.c_void_p()
    return call("ptrace", ctypes.c_long(0x4206), ctypes.c_long(g.victim), null, null)  # PTRACE_SEIZE


@attempt(WORKS, REFUSED)
def read_anothers_environment(g: Ground) -> object:
    return Path(f"/proc/{g.victim}/environ").read_bytes()


@attempt(WORKS, REFUSED)
def read_anothers_command_line(g: Ground) -> object:
    return Path(f"/proc/{g.victim}/cmdline").read_bytes()


@attempt(WORKS, REFUSED)
def list_anothers_descriptors(g: Ground) -> object:
    return os.listdir(f"/proc/{g.victim}/fd")


@attempt(WORKS, REFUSED)
def see_anothers_working_directory(g: Ground) -> object:
    return os.readlink(f"/proc/{g.victim}/cwd")


@attempt(ANY, REFUSED)
def read_anothers_memory(g: Ground) -> object:
    buffer = ctypes.create_string_buffer(8)

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    maps = Path(f"/proc/{g.victim}/maps").read_text()
    here = Vector(ctypes.addressof(buffer), 8)
    there = Vector(int(maps.split("-", 1)[0], 16), 8)
    return call("process_vm_readv", g.victim, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)


@attempt(WORKS, REFUSED)
def list_processes(g: Ground) -> object:
    return os.listdir("/proc")


@attempt(WORKS, REFUSED)
def lower_anothers_priority(g: Ground) -> object:
    return os.setpriority(os.PRIO_PROCESS, g.victim, 19)


@attempt(WORKS, REFUSED)
def limit_another_process(g: Ground) -> object:
    return resource.prlimit(g.victim, resource.RLIMIT_NOFILE, (64, 64))


@attempt(WORKS, REFUSED)
def pin_another_process(g: Ground) -> object:
    return os.sched_setaffinity(g.victim, os.sched_getaffinity(0))


@attempt("nothing", REFUSED)  # a session leader may not, but its fork may; what is tested is that locked has no way
def leave_the_session(g: Ground) -> object:
    if os.fork() == 0:
        os.setsid()
    os._exit(0)


@attempt(WORKS, REFUSED)
def outlive_the_host(g: Ground) -> object:
    return call("prctl", 1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG


@attempt(WORKS, REFUSED)
def be_dumpable_again(g: Ground) -> object:
    return call("prctl", 4, 1, 0, 0, 0)


# Network and other ways to talk


@attempt(WORKS, REFUSED)
def connect_by_tcp(g: Ground) -> object:
    return socket.create_connection(("127.0.0.1", g.tcp), timeout=5).close()


@attempt(WORKS, REFUSED)
def listen(g: Ground) -> object:
    return socket.create_server(("127.0.0.1", 0)).close()


@attempt(WORKS, REFUSED)
def send_by_udp(g: Ground) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        return udp.sendto(b"x", ("127.0.0.1", 9))


@attempt(WORKS, REFUSED)
def connect_to_a_named_socket(g: Ground) -> object:
    with socket.socket(socket.AF_UNIX) as unix:
        return unix.connect(g.unix)


@attempt(WORKS, REFUSED)
def connect_to_an_abstract_socket(g: Ground) -> object:
    with socket.socket(socket.AF_UNIX) as unix:
        return unix.connect(f"\0{g.abstract}")


@attempt(WORKS, REFUSED)
def ask_netlink(g: Ground) -> object:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()


@attempt(WORKS, REFUSED)
def read_the_machines_connections(g: Ground) -> object:
    return Path("/proc/self/net/tcp").read_text()


@attempt(WORKS, REFUSED)
def read_the_threads_connections(g: Ground) -> object:
    return Path(f"/proc/self/task/{os.getpid()}/net/tcp").read_text()


@attempt(WORKS, REFUSED)
def pass_a_descriptor_to_the_host(g: Ground) -> object:
    with socket.socket(fileno=os.dup(PEER)) as peer:
        return socket.send_fds(peer, [b"x"], [READONLY_FILE])


@attempt("OSError", REFUSED)  # ENOTCONN or EISCONN from the kernel; the filter looks before
def send_past_the_peer(g: Ground) -> object:
    with socket.socket(fileno=os.dup(PEER)) as peer:
        return peer.sendto(b"x", g.unix)


@attempt(WORKS, REFUSED)
def system_v_shared_memory(g: Ground) -> object:
    segment = call("shmget", 0, 4096, 0o600 | 0o1000)
    return call("shmctl", segment, 0, ctypes.c_void_p())  # IPC_RMID


@attempt("OSError", REFUSED)  # RLIMIT_MSGQUEUE is 0
def posix_message_queue(g: Ground) -> object:
    return call("mq_open", b"/edif-test", os.O_CREAT | os.O_RDWR, 0o600, ctypes.c_void_p())


@attempt(WORKS, REFUSED)
def anonymous_file_outside_the_memory_limit(g: Ground) -> object:
    return os.close(os.memfd_create("x"))


@attempt("OSError", REFUSED)  # /dev/null is no terminal
def type_into_a_terminal(g: Ground) -> object:
    return fcntl.ioctl(0, 0x5412, b"x")


@attempt(REFUSED, REFUSED)  # the executor's own session has no terminal
def open_the_terminal(g: Ground) -> object:
    try:
        return os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError as error:
        if error.errno in (6, 13):  # ENXIO, EACCES
            raise PermissionError(1, "no terminal") from error
        raise


@attempt(WORKS, REFUSED)
def change_the_personality(g: Ground) -> object:
    return call("personality", ctypes.c_ulong(0xFFFFFFFF))


# What was inherited


@attempt(WORKS, WORKS)
def holds_only_what_was_kept(g: Ground) -> object:
    opened = {fd for fd in range(256) if _is_open(fd)}
    assert opened == {0, 1, 2, REPORT, READONLY_FILE, PEER}, opened
    assert all(os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in range(3))
    assert sys.stdin.read() == ""
    return None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@attempt(WORKS, WORKS)
def has_no_environment(g: Ground) -> object:
    assert set(os.environ) == {"HOME", "TMPDIR"}, dict(os.environ)
    assert os.path.expanduser("~") == g.scratch
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    assert end > start
    return _assert_secretless(ctypes.string_at(start, end - start))


def _assert_secretless(raw: bytes) -> None:
    assert SECRET.encode() not in raw
    assert not raw.strip(b"\0")


@attempt(WORKS, REFUSED)
def reads_nothing_from_its_initial_environment(g: Ground) -> object:
    call("prctl", 4, 1, 0, 0, 0)
    return _assert_secretless(Path("/proc/self/environ").read_bytes())


@attempt(WORKS, WORKS)
def leads_a_session_of_its_own(g: Ground) -> object:
    assert os.getsid(0) == os.getpgrp() == os.getpid()
    return None


# Limits


@attempt("MemoryError", "MemoryError")
def allocate_too_much(g: Ground) -> object:
    return len(bytearray(3000 * MIB))


@attempt("OSError", "OSError")
def map_too_much(g: Ground) -> object:
    return mmap.mmap(-1, 3000 * MIB)


@attempt("ValueError", "ValueError")
def raise_a_limit(g: Ground) -> object:
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    return resource.setrlimit(resource.RLIMIT_AS, infinite)


@attempt("OSError", "OSError")
def write_too_long_a_file(g: Ground) -> object:
    with open(Path(g.scratch, "long"), "wb") as file:
        for _ in range(5):
            file.write(bytes(MIB))
    return None


@attempt("OSError", "OSError")
def open_too_many_files(g: Ground) -> object:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(1000)]


@attempt("SIGXCPU", "SIGXCPU")
def compute_for_ever(g: Ground) -> object:
    while True:
        pass


@attempt(REFUSED, REFUSED)
def lock_memory(g: Ground) -> object:
    page = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return call("mlock", ctypes.c_void_p(address), ctypes.c_size_t(4096))


@attempt(REFUSED, REFUSED)
def raise_its_priority(g: Ground) -> object:
    return os.nice(-5)


@attempt("RuntimeError", "RuntimeError")
def start_threads_without_end(g: Ground) -> object:
    threading.stack_size(64 * 1024)
    stop = threading.Event()
    try:
        for _ in range(2000):
            threading.Thread(target=stop.wait, daemon=True).start()
    finally:
        stop.set()
    return None


@attempt(REFUSED, REFUSED)
def fork_without_end(g: Ground) -> object:
    children = []
    try:
        for _ in range(2000):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            children.append(pid)
    except BlockingIOError as error:
        raise PermissionError(1, "no more processes") from error
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None


# Honest work


@attempt(WORKS, WORKS)
def start_threads(g: Ground) -> object:
    done: list[int] = []
    threads = [threading.Thread(target=done.append, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8
    return None


@attempt(WORKS, WORKS)
def signal_oneself(g: Ground) -> object:
    caught: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert len(caught) == 2
    return None


@attempt(WORKS, WORKS)
def import_late(g: Ground) -> object:
    import asyncio  # noqa: F401
    import decimal
    import encodings.idna
    import hashlib
    import json
    import multiprocessing  # noqa: F401
    import sqlite3
    import ssl
    import uuid
    import zoneinfo

    assert decimal.Decimal("0.1") + 1
    assert encodings.idna.ToASCII("ü")
    assert hashlib.sha256(b"x").hexdigest()
    assert json.loads("[1]") == [1]
    assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
    assert ssl.OPENSSL_VERSION
    assert uuid.uuid4()
    assert zoneinfo.ZoneInfo("Europe/Berlin")
    assert time.localtime()
    return None


@attempt(WORKS, WORKS)
def show_a_traceback_with_source(g: Ground) -> object:
    import json
    import traceback

    try:
        json.loads("[")
    except ValueError:
        assert "raise JSONDecodeError" in traceback.format_exc()
    return None


@attempt(WORKS, WORKS)
def use_the_scratch(g: Ground) -> object:
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "a")
        first.write_text("hello")
        first.rename(Path(folder, "b"))
        assert Path(folder, "b").read_text() == "hello"
        assert folder.startswith(g.scratch)
    return None


@attempt(WORKS, WORKS)
def read_what_was_granted(g: Ground) -> object:
    assert Path(g.readable).read_text() == "public"
    return None


@attempt(WORKS, WORKS)
def talk_to_the_host(g: Ground) -> object:
    with socket.socket(fileno=os.dup(PEER)) as peer:
        assert peer.type == socket.SOCK_STREAM
        peer.settimeout(5)
        peer.sendall(b"hello")
        assert peer.recv(5) == b"world"
    return None
