"""What Redis has written reaches the disk, and a disk that does not take it is told of, once."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from structlog.testing import capture_logs

from edif_hpc.fleet import flush
from tests.support.servers import RedisProcess

CACHESTAT = 451
"""Linux 6.5 and later; the same number on every architecture."""
MIB = 1024 * 1024


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Pages(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def unwritten(path: Path) -> int:
    """Pages of a file that are in memory and not on disk yet."""
    libc, pages = ctypes.CDLL(None, use_errno=True), _Pages()
    with path.open("rb") as file:
        if libc.syscall(CACHESTAT, file.fileno(), ctypes.byref(_Range(0, 0)), ctypes.byref(pages), 0):
            number = ctypes.get_errno()
            if number in (errno.ENOSYS, errno.EOPNOTSUPP):
                pytest.skip("this kernel or file system does not tell what is not on disk yet")
            raise OSError(number, os.strerror(number))
    return int(pages.dirty + pages.writeback)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    found = RedisProcess(tmp_path, persistent=True, flushes="no")
    found.start()
    yield found
    found.kill()


def test_all_that_redis_has_written_is_on_disk_afterwards(redis: RedisProcess) -> None:
    with Redis(port=redis.port, password=redis.endpoint.password) as client:
        client.set("x", b"\0" * MIB)
    files = [found for pattern in flush.PATTERNS for found in redis.folder.glob(pattern)]
    assert sum(path.stat().st_size for path in files) > MIB, "written before it answered"
    if not any(unwritten(path) for path in files):
        pytest.skip("this file system writes at once")
    flush.flush(redis.folder)
    assert not any(unwritten(path) for path in files)


def test_a_disk_that_fails_is_told_of_once_and_tried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "FLUSH_SECONDS", 0.01)
    failing = tmp_path / "appendonly.aof"
    failing.symlink_to("/dev/null")  # which cannot be flushed

    async def scene() -> None:
        keeping = asyncio.create_task(flush.keep_flushed(tmp_path))
        async with asyncio.timeout(30):
            while not said:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # ten more tries
            failing.unlink()
            while len(said) < 2:
                await asyncio.sleep(0.01)
        keeping.cancel()

    with capture_logs() as said:
        asyncio.run(scene())
    assert [line["log_level"] for line in said] == ["error", "info"]
