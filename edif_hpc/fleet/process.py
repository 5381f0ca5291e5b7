"""Processes that outlive whoever started them: a record in the home says which process a component is.

A record names the process by pid, start time and boot, so that a reused pid is never mistaken for a component. It is
written by the child between fork and exec: there is no moment in which a component runs and nobody could find it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from edif_hpc import __version__
from edif_hpc.core.home import Home

LOG_BYTES = 16 * 1024 * 1024
LOG_FILES = 3
OLD_LOG_SECONDS = 7 * 86400.0
POLL_SECONDS = 0.05
"""Between two looks at a process that was told to end: it may be nobody's child here, so no wait would wake."""
PRIVATE_UMASK = 0o077
RECORD_SUFFIX = ".json"
NOT_COMPONENTS = ("ports", "up", "failures")
"""JSON files beside the records: see core/endpoints.py and state.py."""


@dataclass(frozen=True)
class Record:
    """One component as a process. `started` is Unix time; `ticks` is the kernel's start time of that pid."""

    name: str
    pid: int
    ticks: int
    boot: str
    host: str
    version: str
    started: float
    address: str = ""

    @property
    def here(self) -> bool:
        """Whether it was started on this machine: a home may lie on a filesystem that several share."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        return self.here and self.boot == boot_id() and start_ticks(self.pid) == self.ticks


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def start_ticks(pid: int) -> int | None:
    """When the kernel started this pid, or None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(fields[18])


def path_of(home: Home, name: str) -> Path:
    return home.run / f"{name}{RECORD_SUFFIX}"


def read(home: Home, name: str) -> Record | None:
    """The record of a component, whether its process still lives or not."""
    try:
        return Record(**json.loads(path_of(home, name).read_text()))
    except FileNotFoundError:
        return None


def records(home: Home) -> list[Record]:
    """All records of a home, oldest first."""
    found = []
    for path in home.run.glob(f"*{RECORD_SUFFIX}"):
        if path.stem not in NOT_COMPONENTS:
            record = read(home, path.stem)
            if record:
                found.append(record)
    return sorted(found, key=lambda record: record.started)


def living(home: Home, name: str) -> Record | None:
    record = read(home, name)
    return record if record and record.alive else None


def write(home: Home, name: str, pid: int, address: str = "") -> Record:
    """Record that a process is this component."""
    record = Record(
        name, pid, start_ticks(pid) or 0, boot_id(), socket.gethostname(), __version__, time.time(), address
    )
    home.write_private(path_of(home, name), json.dumps(asdict(record)))
    return record


def forget(home: Home, record: Record) -> None:
    """Remove a record, unless a successor has taken its place."""
    if read(home, record.name) == record:
        path_of(home, record.name).unlink(missing_ok=True)


def forget_own(home: Home) -> None:
    """Remove every record that names this very process."""
    for record in records(home):
        if record.pid == os.getpid() and record.alive:
            forget(home, record)


@contextlib.contextmanager
def recorded(home: Home, name: str, address: str = "") -> Iterator[Record]:
    """Record this very process while it serves as a component."""
    present = living(home, name)
    record = present if present and present.pid == os.getpid() else write(home, name, os.getpid(), address)
    try:
        yield record
    finally:
        forget(home, record)


def spawn(
    home: Home,
    name: str,
    command: Sequence[str],
    *,
    address: str = "",
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    keep_open: Sequence[int] = (),
    log: str = "",
) -> subprocess.Popen[bytes]:
    """Start a component in a session of its own, with its output in its log and its record in the home.

    Args:
        log: whose log it writes, if not one of its own name.
    """
    file = home.logs / f"{log or name}.log"
    rotate(file)

    def in_child() -> None:
        # Signals that the supervisor waits for are blocked in it, and a mask survives exec.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(PRIVATE_UMASK)
        write(home, name, os.getpid(), address)

    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder or home.root,
            env=dict(os.environ if environment is None else environment),
            start_new_session=True,
            pass_fds=keep_open,
            preexec_fn=in_child,  # it imports and logs nothing, so a thread's lock cannot stop it
        )
    finally:
        os.close(output)


def rotate(log: Path, limit: int = LOG_BYTES) -> None:
    """Move a log that has grown aside. Its writer keeps its descriptor (O_APPEND), so it is copied and cut."""
    if not log.exists() or log.stat().st_size <= limit:
        return
    for number in range(LOG_FILES - 1, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number + 1}"))
    shutil.copy(log, log.with_name(f"{log.name}.1"))
    os.truncate(log, 0)


def remove_old_logs(home: Home) -> None:
    """Remove what workers wrote that ended long ago: each has a log of its own, and there is no end to workers."""
    for log in home.logs.glob("worker-*.log*"):
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - log.stat().st_mtime > OLD_LOG_SECONDS
            if old and not living(home, log.name.partition(".log")[0]):
                log.unlink()


def last_words(home: Home, name: str, lines: int = 1) -> str:
    """The end of a component's log, for a sentence about why it died."""
    try:
        with (home.logs / f"{name}.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def stop(record: Record, seconds: float, *, how: signal.Signals | None = signal.SIGTERM, family: bool = True) -> bool:
    """Ask a process to end, and kill it when it does not; whatever it had started goes with it unless `family` is
    False. `how` is None when it was asked already. True when it ended by itself."""
    started = descendants(record.pid) if family and record.alive else []
    ended = (how is None or _signal(record, how)) and _gone(record, seconds)
    if not ended and record.alive:
        _signal(record, signal.SIGKILL)
        _gone(record, seconds)
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return ended


def descendants(pid: int) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return children
    except psutil.Error:
        return []


def _signal(record: Record, how: signal.Signals) -> bool:
    if not record.alive:
        return True
    try:
        os.kill(record.pid, how)
    except ProcessLookupError:
        return True
    return True


def _gone(record: Record, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while record.alive:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(record.pid, os.WNOHANG)
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)  # polled with a deadline: it may be nobody's child here
    return True
