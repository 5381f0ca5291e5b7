"""From blocks to bytes, as they come or from a file to a file. What it reads may be anybody's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from ..errors import TransferError
from .layout import BLOCK, HEADER, LENGTHS, Block, Plan, cut_off, damaged


class Decoder:
    """Decodes while bytes arrive, holding one block in both forms and what was fed.

    Args:
        limit: the most raw bytes that a result may have, or None.

    Attributes:
        size: the raw bytes of the whole, or None until the first 16 bytes came.
        done: how many of them were yielded.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.size: int | None = None
        self.done = 0
        self._limit = limit
        self._plan: Plan | None = None
        self._block: Block | None = None
        self._held = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield `(offset, raw bytes)` of each block that is complete now, in order; what is not taken comes next time.

        Raises:
            TransferError: from the iterator, at the first byte that cannot be right.
        """
        self._held += data
        return self._blocks()

    def finish(self) -> None:
        """Say that there is no more.

        Raises:
            TransferError: there should have been.
        """
        if self.size is None or self.done < self.size:
            raise TransferError(
                f"The result ends after {self.done} of {'an unknown number of' if self.size is None else self.size} "
                "bytes: download it again."
            )

    def _blocks(self) -> Iterator[tuple[int, memoryview]]:
        if self._plan is None:
            if (head := self._take(HEADER.size)) is None:
                return
            self._plan = Plan(head, self._limit)
            self.size = self._plan.size
        while not self._plan.complete or self._block is not None:
            if self._block is None:
                if (head := self._take(BLOCK.size)) is None:
                    return
                self._block = self._plan.block(head)
            if (payload := self._take(self._block.coded)) is None:
                return
            block, self._block = self._block, None
            raw = _raw(block, payload)
            self.done += block.raw
            yield block.offset, raw
        if self._held:
            raise damaged(self.done)

    def _take(self, length: int) -> bytes | None:
        if len(self._held) < length:
            return None
        taken = bytes(memoryview(self._held)[:length])
        del self._held[:length]
        return taken


def decode(data: bytes | bytearray | memoryview, limit: int | None = None) -> bytes:
    """The raw bytes of a result that is all in memory.

    Raises:
        TransferError: it is damaged, cut off, or larger than `limit`.
    """
    decoder = Decoder(limit)
    raw = b"".join(block for _, block in decoder.feed(data))
    decoder.finish()
    return raw


def decode_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], threads: int = 1, limit: int | None = None
) -> int:
    """Decode a file into another with as many threads, each of which holds one block; returns the raw size in bytes.

    All headers are checked before anything is written, and a target that could not be finished is removed.

    Raises:
        TransferError: the source is damaged, cut off, or holds more than `limit` raw bytes.
        OSError: a file cannot be read or written.
    """
    with open(source, "rb") as coded:
        size, blocks = _planned(coded, limit)
        with open(target, "wb") as raw:
            try:
                os.ftruncate(raw.fileno(), size)
                with ThreadPoolExecutor(max(1, threads), thread_name_prefix="planes") as pool:
                    try:
                        for _ in pool.map(lambda found: _decode_at(coded.fileno(), raw.fileno(), *found), blocks):
                            pass
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise
            except BaseException:
                Path(target).unlink(missing_ok=True)
                raise
    return size


def _planned(file: BinaryIO, limit: int | None) -> tuple[int, list[tuple[int, Block]]]:
    """The raw size, and every block with where its coded bytes begin."""
    end, at = os.fstat(file.fileno()).st_size, HEADER.size
    head = os.pread(file.fileno(), HEADER.size, 0)
    if len(head) < HEADER.size:
        raise cut_off(0)
    plan = Plan(head, limit)
    blocks: list[tuple[int, Block]] = []
    while not plan.complete:
        head = os.pread(file.fileno(), BLOCK.size, at)
        if len(head) < BLOCK.size:
            raise cut_off(plan.planned)
        block = plan.block(head)
        blocks.append((at + BLOCK.size, block))
        at += BLOCK.size + block.coded
        if at > end:
            raise cut_off(block.offset)
    if at != end:
        raise damaged(plan.size)
    return plan.size, blocks


def _decode_at(source: int, target: int, at: int, block: Block) -> None:
    payload = os.pread(source, block.coded, at)
    if len(payload) < block.coded:
        raise cut_off(block.offset)
    raw = _raw(block, payload)
    done = 0
    while done < block.raw:
        done += os.pwrite(target, raw[done:], block.offset + done)


def _raw(block: Block, payload: bytes) -> memoryview:
    import numpy as np

    if block.stride == 0:
        return memoryview(payload)
    count, left = divmod(block.raw, block.stride)
    table = LENGTHS[block.stride]
    if len(payload) < table.size:
        raise damaged(block.offset)
    lengths = table.unpack_from(payload)
    if table.size + sum(lengths) + left != len(payload):
        raise damaged(block.offset)
    raw = np.empty(block.raw, np.uint8)
    words = raw[: count * block.stride].reshape(-1, block.stride)
    at = table.size
    for number, length in enumerate(lengths):
        words[:, number] = np.frombuffer(_plane(block, memoryview(payload)[at : at + length], count), np.uint8)
        at += length
    raw[words.size :] = np.frombuffer(payload, np.uint8)[at:]
    return raw.data


def _plane(block: Block, coded: memoryview, count: int) -> bytes | memoryview:
    """`count` bytes, which are one zstd frame where they are fewer."""
    import zstandard

    if len(coded) == count:
        return coded
    try:
        # A frame's own word decides how much zstandard allocates, whatever is passed as the most.
        if zstandard.frame_content_size(coded) != count:
            raise damaged(block.offset)
        return zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise damaged(block.offset) from error
