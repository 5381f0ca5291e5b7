"""Weights on their way to where loading them is fast: into the page cache, or into a copy in the worker's own scratch.

Loading maps safetensors files and touches them page by page, in no order and from one thread. On a parallel file system
that took 20 minutes for 704 GiB, and 43 s after the same files had been read from front to end. So they are read that
way first, in large blocks and several at once. What it must not know: devices, model hosts, and what is in the files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.core import log
from edif_hpc.core.errors import HostError
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.checkpoint import Checkpoint, describe, entry_name, weight_files
from edif_hpc.hardware.memory import gib

BLOCK_BYTES = 8 * 1024**2
SLICE_BYTES = 256 * 1024**2
"""What one thread reads on end: a model of a single file is read by several all the same."""
READERS = 8
"""Enough to keep several storage servers busy; they wait for these, not for a core."""
SPARE_BYTES = 1024**3
"""Of a scratch folder's file system, what a copy leaves for everything else."""
FIRST_WORD_SECONDS = 2.0
NEXT_WORDS_SECONDS = 10.0
"""Who waits for a model is told how far it is: what takes less than the first is not worth a word."""
COPIES = "weights"
"""The folder of copies within a worker's scratch: a hub cache."""

Tell = Callable[[str], Awaitable[None]]

logger = log.get("worker")


async def nobody(sentence: str) -> None:
    """Where there is nobody to tell."""


@dataclass
class Copy:
    """The weights of one commit in the scratch."""

    snapshot: Path
    stamps: list[tuple[int, int, int]]
    """Of the files it was made from: one that was pulled anew is copied anew."""
    keys: set[str] = field(default_factory=set)
    """Models that were loaded from it."""


class Staging:
    """What one worker does with weights before it loads them.

    Args:
        how: `read` leaves them where they are, `prefetch` reads them into the page cache, `stage` copies them to the
            scratch. What does not fit there is prefetched, with a warning in the log that says what was missing.
        cache: the hub cache that all workers share; never written to.
        scratch: this worker's own folder, which is removed with it.
    """

    def __init__(self, how: str, cache: Path, scratch: Path) -> None:
        self.how = how
        self.cache = cache
        self.hub = scratch / COPIES
        self._copies: dict[Path, Copy] = {}

    async def bring(self, key: ModelKey, in_use: Collection[str], tell: Tell = nobody) -> Path:
        """Have a model's weights where loading them is fast; cancelling stops it. One at a time.

        Args:
            in_use: keys of the models here: copies of others may go where room is short.
            tell: called now and then with how far it is, when it takes long.

        Returns:
            The hub cache to load the model from.

        Raises:
            ModelError: the model is not in the cache.
        """
        if self.how == "read":
            return self.cache
        checkpoint = describe(self.cache, key.repo_id, key.revision)
        try:
            if self.how == "stage":
                try:
                    await self._stage(checkpoint, key, in_use, tell)
                    return self.hub
                except HostError as error:
                    logger.warning("not staged, read in place", model=key.repo_id, error=str(error))
            files = [(path, None) for path in weight_files(checkpoint)]
            await _carried(Carrier(files), f"Reading the weights of {key.repo_id}", tell)
        except OSError as error:  # loading meets it again, and then says it to whoever waits
            logger.warning("weights could not be read ahead", model=key.repo_id, error=str(error))
        return self.cache

    async def _stage(self, checkpoint: Checkpoint, key: ModelKey, in_use: Collection[str], tell: Tell) -> None:
        entry = self.hub / entry_name(checkpoint.repo_id)
        snapshot = entry / "snapshots" / checkpoint.commit
        files = weight_files(checkpoint)
        stamps = [_stamp(path) for path in files]
        copy = self._copies.get(snapshot)
        if copy is None or copy.stamps != stamps:
            self._drop(snapshot)
            self._make_room(checkpoint.repo_id, sum(size for size, _, _ in stamps), in_use)
            await self._copy(files, snapshot, checkpoint.repo_id, tell)
            copy = self._copies[snapshot] = Copy(snapshot, stamps)
        copy.keys.add(str(key))
        if key.revision != checkpoint.commit:
            ref = entry / "refs" / (key.revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(checkpoint.commit)
        _link(checkpoint.path, snapshot)
        _link(self.cache, self.hub)  # a model's own code may lie in another repository

    async def _copy(self, files: Sequence[Path], snapshot: Path, repo_id: str, tell: Tell) -> None:
        """Copy files into a snapshot, which is there as a whole or not at all."""
        if snapshot.parent.parent.is_symlink():
            snapshot.parent.parent.unlink()
        half = snapshot.with_suffix(".half")
        half.mkdir(mode=0o700, parents=True)
        carrier = Carrier([(path, half / path.name) for path in files])
        try:
            await _carried(carrier, f"Copying the weights of {repo_id} to its node", tell)
            half.rename(snapshot)
        except OSError as error:
            raise HostError(
                f"The weights of {repo_id} could not be copied to {self.hub} ({error.strerror} after "
                f"{gib(carrier.done)} of {gib(carrier.total)}): let TMPDIR name a larger file system, or set "
                "models.weights to prefetch."
            ) from error
        finally:
            shutil.rmtree(half, ignore_errors=True)

    def _make_room(self, repo_id: str, needed: int, in_use: Collection[str]) -> None:
        """Remove copies that no model here uses, the oldest first, until there is room.

        Raises:
            HostError: there is none even then.
        """
        self.hub.mkdir(mode=0o700, exist_ok=True)
        unused = [copy for copy in self._copies.values() if copy.keys.isdisjoint(in_use)]
        while (free := shutil.disk_usage(self.hub).free) < needed + SPARE_BYTES and unused:
            self._drop(unused.pop(0).snapshot)
        if free < needed + SPARE_BYTES:
            raise HostError(
                f"The weights of {repo_id} take {gib(needed)}, and of the {gib(free)} free in {self.hub} "
                f"{gib(SPARE_BYTES)} stay for requests: let TMPDIR name a larger file system, or set models.weights "
                "to prefetch."
            )

    def _drop(self, snapshot: Path) -> None:
        if self._copies.pop(snapshot, None):
            entry = snapshot.parent.parent  # without a copy in it, it becomes a link again
            shutil.rmtree(snapshot if any(other.is_relative_to(entry) for other in self._copies) else entry)


class Carrier:
    """Reads files from front to end, several slices at once, and writes them elsewhere where a target is named.

    Attributes:
        done: bytes so far, of `total`.
    """

    def __init__(self, files: Sequence[tuple[Path, Path | None]]) -> None:
        self.files = [(source, target, source.stat().st_size) for source, target in files]
        self.total = sum(size for _, _, size in self.files)
        self.done = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Blocks until all is done, or `stop` was called.

        Raises:
            OSError: of the first that fails; the others are stopped.
        """
        slices = []
        for source, target, size in self.files:
            if target:
                target.touch(mode=0o600)
            slices += [(source, target, start, min(start + SLICE_BYTES, size)) for start in range(0, size, SLICE_BYTES)]
        with ThreadPoolExecutor(READERS, "weights") as pool:
            list(pool.map(self._carry, slices))

    def stop(self) -> None:
        """End soon, with what is done."""
        self._stopped.set()

    def _carry(self, piece: tuple[Path, Path | None, int, int]) -> None:
        source, target, at, end = piece
        block = memoryview(bytearray(min(BLOCK_BYTES, end - at)))
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        writer = os.open(target, os.O_WRONLY | os.O_CLOEXEC) if target else -1
        try:
            os.posix_fadvise(reader, at, end - at, os.POSIX_FADV_SEQUENTIAL)
            while at < end and not self._stopped.is_set():
                got = os.preadv(reader, [block[: end - at]], at)
                if not got:
                    raise OSError(0, "the file has become shorter", str(source))
                if target:
                    _write(writer, block[:got], at)
                at += got
                with self._lock:
                    self.done += got
        except OSError:
            self.stop()
            raise
        finally:
            os.close(reader)
            if target:
                os.close(writer)


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


async def _carried(carrier: Carrier, what: str, tell: Tell) -> None:
    """Run a carrier in a thread and tell how far it is. Once this has ended, cancelled or not, nothing is written."""
    work = asyncio.get_running_loop().run_in_executor(None, carrier.run)
    pause = FIRST_WORD_SECONDS
    try:
        while not (await asyncio.wait([work], timeout=pause))[0]:
            pause = NEXT_WORDS_SECONDS
            sentence = f"{what}: {gib(carrier.done)} of {gib(carrier.total)}."
            logger.info("weights", progress=sentence)
            await tell(sentence)
    finally:
        carrier.stop()
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:
                continue  # the first one is under way already; the thread sees `stop` after its block
    work.result()


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _link(source: Path, target: Path) -> None:
    """Have everything of one folder in another too, as links to where it really is; what is there already stays."""
    for child in source.iterdir():
        link = target / child.name
        if not child.name.startswith(".") and not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(child.resolve())
