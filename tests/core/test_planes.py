"""Whatever bytes go in come out again; what was damaged, cut off or made up is one sentence and costs no memory."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from edif_hpc.core import planes
from edif_hpc.core.errors import TransferError
from edif_hpc.core.planes import encoder
from edif_hpc.core.planes.layout import BLOCK, HEADER, LARGEST_BLOCK

pytestmark = pytest.mark.fast

BLOCK_BYTES = 64 * 1024
"""For these tests, so that few bytes make many blocks."""
NOISE = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "BLOCK_BYTES", BLOCK_BYTES)


def coded(raw: bytes, threads: int = 1) -> bytes:
    target = io.BytesIO()
    written = planes.encode(io.BytesIO(raw), target, len(raw), threads)
    assert written == len(target.getvalue())
    return target.getvalue()


def fed(data: bytes, piece: int, limit: int | None = None) -> bytes:
    """Decode as bytes arrive in pieces."""
    decoder, raw = planes.Decoder(limit), bytearray()
    for at in range(0, len(data), piece):
        for offset, block in decoder.feed(data[at : at + piece]):
            assert offset == len(raw)
            raw += block
    decoder.finish()
    assert decoder.size == decoder.done == len(raw)
    return bytes(raw)


def to_file(data: bytes, folder: Path, threads: int = 1, limit: int | None = None) -> bytes:
    (folder / "coded").write_bytes(data)
    size = planes.decode_file(folder / "coded", folder / "raw", threads, limit)
    raw = (folder / "raw").read_bytes()
    assert len(raw) == size
    return raw


def strides(data: bytes) -> list[int]:
    found, at = [], HEADER.size
    while at < len(data):
        _, length, stride = BLOCK.unpack_from(data, at)
        found.append(stride)
        at += BLOCK.size + length
    return found


def floats(count: int, kind: str = "float32") -> bytes:
    """Numbers as activations are: near zero. bf16 is the upper half of a float32."""
    drawn = NOISE.normal(0, 3, count).astype("float64" if kind == "float64" else "float32")
    if kind == "bfloat16":
        return (drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return drawn.astype(kind).tobytes()


WORDS = [NOISE.integers(97, 123, NOISE.integers(1, 9)).astype(np.uint8).tobytes() for _ in range(2000)]
TEXT = b" ".join(random.Random(4).choices(WORDS, k=60_000))
KINDS: dict[str, tuple[bytes, int]] = {
    "bfloat16": (floats(200_000, "bfloat16"), 2),
    "float16": (floats(200_000, "float16"), 2),
    "float32": (floats(100_000), 4),
    "float64": (floats(50_000, "float64"), 8),
    "int64": (NOISE.integers(0, 49_152, 50_000).tobytes(), 8),
    "text": (TEXT, 1),
    "noise": (NOISE.bytes(300_000), 0),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_number_gets_its_stride_and_comes_back(kind: str, threads: int, tmp_path: Path) -> None:
    raw, stride = KINDS[kind]
    data = coded(raw, threads)
    assert set(strides(data)[:-1]) == {stride}
    assert data == coded(raw)
    assert fed(data, 10_000) == to_file(data, tmp_path, threads) == planes.decode(data) == raw
    if stride != 0:
        assert len(data) < 0.97 * len(raw)
    if stride in (2, 4):
        assert len(data) < 0.97 * len(zstandard.ZstdCompressor(level=3).compress(raw))


@pytest.mark.parametrize(
    "size", [0, 1, 3, 7, 8, 63, 64, 65, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 13]
)
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "noise", "text"])
def test_any_size_comes_back(kind: str, size: int, tmp_path: Path) -> None:
    raw = KINDS[kind][0][:size]
    data = coded(raw)
    assert len(data) <= HEADER.size + size + BLOCK.size * (size // BLOCK_BYTES + 1)
    assert fed(data, 1 if size < 2000 else 777) == to_file(data, tmp_path) == raw


def test_kinds_that_follow_one_another_in_pieces_of_any_size(tmp_path: Path) -> None:
    raw = b"".join(kind[:130_001] for kind, _ in KINDS.values())
    found = bytearray(planes.header(len(raw)))
    coding = planes.Encoder(found.extend, threads=2)
    dice, at = random.Random(3), 0
    while at < len(raw):
        step = dice.choice([0, 1, 64, 5000, 200_000])
        coding.write(memoryview(raw)[at : at + step])
        at += step
    coding.finish()
    assert coding.size == len(raw)
    assert bytes(found) == coded(raw)
    assert to_file(bytes(found), tmp_path, threads=2) == raw


def test_blocks_are_yielded_as_soon_as_they_are_complete() -> None:
    raw = KINDS["float32"][0]
    data = coded(raw)
    decoder = planes.Decoder()
    first = HEADER.size + BLOCK.size + BLOCK.unpack_from(data, HEADER.size)[1]
    assert list(decoder.feed(data[: first - 1])) == []
    assert decoder.size == len(raw)
    assert [(offset, bytes(block)) for offset, block in decoder.feed(data[first - 1 : first])] == [
        (0, raw[:BLOCK_BYTES])
    ]
    decoder.feed(data[first:])  # what nobody takes comes with the next
    assert b"".join(block for _, block in decoder.feed(b"")) == raw[BLOCK_BYTES:]
    decoder.finish()


def refusals(data: bytes, folder: Path, limit: int | None = None) -> list[str]:
    """The sentences with which both decoders refuse."""
    found = []
    for decode in (lambda: fed(data, 5000, limit), lambda: to_file(data, folder, 2, limit)):
        with pytest.raises(TransferError) as refusal:
            decode()
        found.append(str(refusal.value))
    assert not (folder / "raw").exists()
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in found)
    return found


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    data = coded(KINDS["float32"][0])
    ends = [0, 1, 15, 16, 17, 27, 28, 29, len(data) // 2, len(data) - 1]
    for end in ends:
        assert all("download it again" in sentence for sentence in refusals(data[:end], tmp_path)), end


def test_what_follows_the_end_is_refused(tmp_path: Path) -> None:
    refusals(coded(TEXT) + b"x", tmp_path)
    refusals(coded(b"") + b"x", tmp_path)


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    assert "EDIFPLN1" in refusals(b"PK\x03\x04" + bytes(100), tmp_path)[0]


def test_a_limit_binds_before_anything_is_decoded(tmp_path: Path) -> None:
    data = coded(TEXT)
    assert fed(data, 5000, len(TEXT)) == to_file(data, tmp_path, limit=len(TEXT)) == TEXT
    (tmp_path / "raw").unlink()
    assert f"no more than {len(TEXT) - 1} are allowed" in refusals(data, tmp_path, len(TEXT) - 1)[0]


def test_any_damaged_byte_is_refused_or_changes_as_many_bytes_as_it_may(tmp_path: Path) -> None:
    """zstd frames carry no checksum here, which is the digests' task; but nothing else may happen."""
    raw, dice = KINDS["float32"][0][:150_000], random.Random(9)
    data = coded(raw)
    for at in [*range(60), *(dice.randrange(len(data)) for _ in range(300))]:
        broken = bytearray(data)
        broken[at] ^= dice.randrange(1, 256)
        try:
            assert len(fed(bytes(broken), len(broken), limit=len(raw))) == len(raw)
        except TransferError:
            continue


def one_block(size: int, raw: int, length: int, stride: int, payload: bytes) -> bytes:
    return planes.header(size) + BLOCK.pack(raw, length, stride) + payload


def frame(raw: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(raw)


def planar(size: int, *coded: bytes, end: bytes = b"") -> bytes:
    """One block whose planes are given."""
    payload = struct.pack(f"<{len(coded)}I", *map(len, coded)) + b"".join(coded) + end
    return one_block(size, size, len(payload), len(coded), payload)


BOMB, PLAIN, HALF = frame(bytes(512 * 1024 * 1024)), frame(bytes(1000)), frame(bytes(500))


@pytest.mark.parametrize(
    "data",
    [
        planar(200_000, BOMB),
        planar(200_000, BOMB, HALF),
        planar(1000, frame(bytes(1000), write_content_size=False)),
        planar(1000, PLAIN + b"x"),
        planar(1000, PLAIN, end=b"x"),
        planar(1000, HALF),
        planar(1000, HALF, b""),
        planar(1000, HALF, HALF, HALF),
        planar(3, b"", b"", b"", b"", end=b"abc"),
        one_block(1000, 1000, 3, 4, bytes(3)),
        one_block(1000, 1000, 8 + len(HALF), 2, struct.pack("<II", len(HALF), 2**32 - 1) + HALF),
        one_block(1000, 1000, 1001, 0, bytes(1001)),
        one_block(1000, 1000, 999, 0, bytes(999)),
        one_block(1000, 1000, 0, 1, b""),
        one_block(1000, 0, 0, 0, b""),
        one_block(1000, 2000, 10, 1, bytes(10)),
        one_block(100_000, 64, 64, 0, bytes(64)),
        one_block(200_000, 65_537, 65_537, 0, bytes(65_537)),
        one_block(2**63, 2**32 - 64, 2**32 - 64, 0, b""),
        one_block(LARGEST_BLOCK * 2, LARGEST_BLOCK + 64, 100, 1, bytes(100)),
        planes.header(200_000) + 2 * (BLOCK.pack(100_032, 100_032, 0) + bytes(100_032)),
        planes.header(2**64 - 1) + BLOCK.pack(65_536, 100, 1) + bytes(100),
    ],
    ids=lambda data: data[8:28].hex(),
)
def test_headers_that_lie_are_refused_and_cost_no_memory(data: bytes, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        refusals(data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_source_that_ends_early_is_not_encoded() -> None:
    with pytest.raises(TransferError, match="3 bytes to encode where 4"):
        planes.encode(io.BytesIO(b"abc"), io.BytesIO(), 4)


def test_an_error_of_whoever_takes_the_blocks_ends_the_threads() -> None:
    def full(data: Any) -> None:
        raise OSError("full")

    coding = planes.Encoder(full, threads=2)
    with pytest.raises(OSError, match="full"):
        coding.write(TEXT)
    coding.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("planes")]


def test_the_format_stays_what_it_is() -> None:
    """Clients and services of other versions read it."""
    data = coded(b"\x01\x02\x03")
    assert data == b"EDIFPLN1" + struct.pack("<Q", 3) + struct.pack("<III", 3, 3, 0) + b"\x01\x02\x03"
    upper = zstandard.ZstdCompressor().compress(b"u" * 100)
    payload = struct.pack("<II", 100, len(upper)) + b"l" * 100 + upper + b"!"
    assert planes.decode(one_block(201, 201, len(payload), 2, payload)) == b"lu" * 100 + b"!"


def test_whoever_does_not_use_it_needs_neither_numpy_nor_zstandard() -> None:
    code = "import sys, edif_hpc.core.planes; assert not {'numpy', 'zstandard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
