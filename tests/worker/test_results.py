"""What is written of saved values, and the digests that go with it, without a model."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zstandard

from edif_hpc.core import planes
from edif_hpc.core.wire import ResultFormat
from edif_hpc.worker import digests, results
from edif_hpc.worker.contract import MIB, ResultFile
from edif_hpc.worker.failures import Refusal

pytestmark = pytest.mark.fast


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("result")
    yield fd
    os.close(fd)


def written(fd: int, saved: dict[str, Any], form: ResultFormat, threads: int = 1) -> bytes:
    os.ftruncate(fd, 0)
    size = results.write(saved, fd, form, 64 * MIB, threads)
    assert os.fstat(fd).st_size == size
    return os.pread(fd, size, 0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 1000, 3_000_000])
def test_every_format_holds_the_file_that_torch_writes(fd: int, threads: int, count: int) -> None:
    saved = {"bf16": torch.randn(count).bfloat16(), "some": [torch.arange(7), "text"], "nothing": torch.empty(0, 5)}
    plain = written(fd, saved, ResultFormat.PLAIN)
    packed = written(fd, saved, ResultFormat.ZSTD, threads)
    assert zstandard.ZstdDecompressor().decompress(packed) == plain
    split = written(fd, saved, ResultFormat.PLANES, threads)
    assert planes.decode(split) == plain
    assert len(split) < (0.97 * len(packed) if count > 1000 else len(packed) + 100)
    loaded = torch.load(io.BytesIO(plain), weights_only=False)
    assert torch.equal(loaded["bf16"], saved["bf16"])


@pytest.mark.parametrize("form", ResultFormat)
def test_what_is_too_large_writes_no_more_than_it_may(fd: int, form: ResultFormat) -> None:
    saved = {"noise": torch.randint(0, 2**60, (2 * MIB,))}
    with pytest.raises(Refusal, match="more than the limit of 5 MiB"):
        results.write(saved, fd, form, 5 * MIB, 2)
    assert os.fstat(fd).st_size <= 5 * MIB


def test_an_error_while_planes_are_made_ends_the_saving_and_not_the_process(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: planes.Encoder, data: Any) -> int:
        raise MemoryError

    monkeypatch.setattr(planes.Encoder, "write", broken)
    with pytest.raises(MemoryError):
        results.write({"some": torch.ones(1000)}, fd, ResultFormat.PLANES, MIB)


class Parted(torch.Tensor):
    """Stands for a DTensor: what its ranks hold is gathered anew whenever it is asked for."""

    number: int

    def full_tensor(self) -> torch.Tensor:
        return torch.full((1000,), float(self.number))[:10]


def test_what_is_gathered_while_saving_is_not_taken_for_what_was_gathered_before(fd: int) -> None:
    """The memory of the one is often where the other's was."""
    saved = {}
    for number in range(20):
        saved[str(number)] = torch.Tensor._make_subclass(Parted, torch.zeros(1))
        saved[str(number)].number = number
    loaded = torch.load(io.BytesIO(written(fd, saved, ResultFormat.PLAIN)), weights_only=False)
    assert [float(loaded[str(number)][0]) for number in range(20)] == list(range(20))


# -- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (0, 8 * MIB),
        (8 * MIB, 8 * MIB),
        (512 * 8 * MIB, 8 * MIB),
        (512 * 8 * MIB + 1, 16 * MIB),
        (40 * 1024 * MIB, 80 * MIB),
    ],
)
def test_parts_grow_when_there_would_be_too_many(size: int, length: int) -> None:
    assert digests.part_bytes(size) == length
    assert -(-size // length) <= digests.MOST_PARTS


@pytest.mark.parametrize("size", [0, 1, 1000, 200_000, 8 * MIB, 8 * MIB + 1, 20 * MIB])
def test_digests_are_those_of_the_parts(fd: int, size: int) -> None:
    data = os.urandom(1000) * (size // 1000) + bytes(size % 1000)
    os.truncate(fd, size)
    os.pwrite(fd, data, 0)
    open_before = len(os.listdir("/proc/self/fd"))
    found = asyncio.run(digests.of(ResultFile(fd, size)))
    parts = [data[start : start + 8 * MIB] for start in range(0, size, 8 * MIB)]
    assert found == [hashlib.sha256(part).hexdigest() for part in parts]
    assert len(os.listdir("/proc/self/fd")) == open_before
