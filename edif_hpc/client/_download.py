"""Reading a result by ranges, several at once, straight to disk; and going on where reading stopped.

Beside the partial file lies a small state file (see `_transfer`), so a later call, in another process or after a
crash, reads only what is missing. Parts are held to their checksums where the service gives them. A refused link is
renewed. What it must not know: what the bytes mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import httpx

from edif_hpc.core.links import by_the_same_door

from ._connection import CONNECT_SECONDS, PATIENCE_SECONDS, Connection, pauses, retry_after
from ._errors import ClientError, CorruptPart, DownloadFailed, ResultExpired
from ._transfer import State, Transfer, beside

try:
    import fcntl
except ImportError:  # not on Windows, where two processes must not read one result into one place
    fcntl = None  # type: ignore[assignment]  # mypy knows the module of this platform

READERS = 6
"""Ranges read at once: a distant store answers one with a fraction of the line."""
CHUNK = 128 * 1024
SILENCE_SECONDS = 20.0
"""A range that brings nothing for so long is asked for again: its socket may be a dead one."""
RENEWALS = 3
"""Links that may be refused one after the other."""
CORRUPTIONS = 3
"""Times that one part may not match its checksum."""
JOIN_SECONDS = 2.0

Advance = Callable[[int], None]
"""Told how many more bytes have come; fewer than none when some must be read again."""


class Target(Protocol):
    """Where bytes go."""

    def write(self, offset: int, data: bytes) -> None: ...

    def read(self, offset: int, size: int) -> bytes: ...


class Memory:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])


class File:
    """One file for all readers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            self._file.seek(offset)
            self._file.write(data)

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)


class Source:
    """The result of one request, readable by ranges for as long as the service keeps it."""

    def __init__(self, connection: Connection, request_id: str) -> None:
        self._connection = connection
        self._path = f"/api/requests/{request_id}"
        self._lock = threading.Lock()
        self._refused = 0
        self.request_id = request_id
        self.transfer = Transfer.of(connection.get(self._path))
        self._link = self.transfer.link

    def stream(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end`, as they come; it may end early.

        Raises:
            httpx.TransportError: the line broke.
            Pause: the service wants to be asked again.
            DownloadFailed: it makes no sense to.
        """
        link = self._link
        door = by_the_same_door(link, self._connection.url)
        timeout = httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
        headers = {"range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
        with self._connection.plain.stream("GET", door, headers=headers, timeout=timeout) as answer:
            self._judge(answer, link)
            skip = start if answer.status_code == 200 else 0  # a proxy may drop the header that asks for a range
            for chunk in answer.iter_raw(CHUNK):
                kept = chunk[skip:][: end - start]
                skip = max(0, skip - len(chunk))
                start += len(kept)
                if kept:
                    self._refused = 0
                    yield kept
                if start >= end:
                    return

    def _judge(self, answer: httpx.Response, link: str) -> None:
        status = answer.status_code
        if status in (200, 206):
            return
        if status in (400, 401, 403):  # what gateways and object stores say of a link whose time is over
            self._renew(link, status)
            raise Pause(0.0, "the link was renewed")
        if status in (404, 410):
            raise ResultExpired(f"The service keeps the result of request {self.request_id} no longer; run it again.")
        if status == 416:
            raise DownloadFailed("The result is not as long as the service said; fetch it again.")
        raise Pause(retry_after(answer), f"it answered {status}")

    def _renew(self, refused: str, status: int) -> None:
        with self._lock:
            if refused != self._link:  # another reader has done it
                return
            self._refused += 1
            if self._refused > RENEWALS:
                raise DownloadFailed(
                    f"Where the result of request {self.request_id} lies, its links are refused ({status}): look "
                    "whether the clocks of this machine and the store agree."
                )
            self._link = Transfer.of(self._connection.get(self._path)).link


class Pause(Exception):
    """The service asks for `seconds`."""

    def __init__(self, seconds: float, why: str) -> None:
        super().__init__(why)
        self.seconds = seconds


class Stopped(Exception):
    """Another reader failed, or the user wants no more."""


def into_memory(source: Source, advance: Advance) -> bytearray:
    """All of a small result."""
    memory, stop = Memory(source.transfer.size), threading.Event()
    for part in range(source.transfer.parts):
        _read_part(source, part, memory, advance, stop)
    return memory.data


def into_file(source: Source, path: Path, advance: Advance, recalled: Advance) -> None:
    """The result as the file `path`, which appears when it is whole; until then `path` + ".part" and ".state" hold it.

    Args:
        recalled: told once how many bytes lie there already.

    Raises:
        DownloadFailed: it cannot be read to its end now; what was read stays.
    """
    part_file, state_file = beside(path, "part"), beside(path, "state")
    part_file.touch(mode=0o600)
    with part_file.open("r+b", buffering=0) as file, _alone(file, path):
        state = State.recalled(state_file, source.request_id, source.transfer)
        room = shutil.disk_usage(path.parent).free
        missing = source.transfer.size - state.bytes
        if missing > room:
            raise DownloadFailed(
                f"The result needs {missing / 1e9:.1f} GB in {path.parent}, and {room / 1e9:.1f} are free; give "
                "another path."
            )
        file.truncate(source.transfer.size)
        recalled(state.bytes)
        _read_all(source, File(file), state, advance)
        part_file.replace(path)
        state_file.unlink(missing_ok=True)


def _read_all(source: Source, target: Target, state: State, advance: Advance) -> None:
    transfer = source.transfer
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for part in range(transfer.parts):
        if transfer.digests or state.of(part) < transfer.length(
            part
        ):  # a crash may have left less on disk than the state says
            waiting.put(part)
    stop, failures = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            while not stop.is_set():
                part = waiting.get_nowait()
                _read_part(source, part, target, advance, stop, state)
                state.note(part, transfer.length(part), whole=True)
        except (queue.Empty, Stopped):
            return
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the readers
            failures.append(error)
            stop.set()

    readers = [threading.Thread(target=work, daemon=True) for _ in range(min(READERS, waiting.qsize()))]
    for reader in readers:
        reader.start()
    try:
        for reader in readers:
            while reader.is_alive() and not failures:
                reader.join(0.2)  # short, so that Ctrl-C is heard
    finally:
        stop.set()
        until = time.monotonic() + JOIN_SECONDS
        for reader in readers:
            reader.join(max(0.0, until - time.monotonic()))
    if failures:
        raise failures[0]


def _read_part(
    source: Source, part: int, target: Target, advance: Advance, stop: threading.Event, state: State | None = None
) -> None:
    """One part, whole and right; `state` knows what is there already, and is told what comes."""
    digest = source.transfer.digests[part] if source.transfer.digests else ""
    start, end = source.transfer.span(part)
    there = state.of(part) if state else 0
    for _ in range(CORRUPTIONS + bool(there)):
        seen = hashlib.sha256(target.read(start, there) if digest else b"")
        at = start + there

        def hear(chunk: bytes, seen: Any = seen) -> None:
            nonlocal at
            at += len(chunk)
            seen.update(chunk)
            if state:
                state.note(part, at - start)

        _read_span(source, at, end, target, hear, advance, stop)
        if not digest or seen.hexdigest() == digest:
            return
        advance(start - end)
        there = 0
        if state:
            state.note(part, 0)
    raise CorruptPart(
        f"Bytes {start} to {end} of the result of request {source.request_id} did not match their checksum "
        f"{CORRUPTIONS} times; try again later, or over another line."
    )


def _read_span(
    source: Source,
    at: int,
    end: int,
    target: Target,
    hear: Callable[[bytes], None],
    advance: Advance,
    stop: threading.Event,
) -> None:
    """From `at` to `end`, through broken lines: each further try asks for what is still missing."""
    patient_until, waits, why = time.monotonic() + PATIENCE_SECONDS, pauses(), ""
    while at < end:
        asked, before = 0.0, at
        try:
            for chunk in source.stream(at, end):
                if stop.is_set():
                    raise Stopped
                target.write(at, chunk)
                hear(chunk)
                at += len(chunk)
                advance(len(chunk))
        except httpx.TransportError as error:
            why = str(error).strip().rstrip(".") or type(error).__name__
        except Pause as error:
            asked, why = error.seconds, str(error)
        except (ClientError, Stopped):
            raise
        except OSError as error:
            raise DownloadFailed(
                f"The result cannot be written ({error.strerror}); make room and ask again."
            ) from error
        if at > before:
            patient_until, waits = time.monotonic() + PATIENCE_SECONDS, pauses()
        if at < end:
            if time.monotonic() > patient_until:
                raise DownloadFailed(f"The result cannot be read to its end ({why}); ask again to read on.")
            if stop.wait(max(asked, next(waits))):
                raise Stopped


@contextlib.contextmanager
def _alone(file: BinaryIO, path: Path) -> Iterator[None]:
    """Hold the partial file against other processes; the lock goes with the descriptor."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadFailed(
                f"Another process is reading this result into {path}; wait for it, or give another path."
            ) from None
    yield
