"""How coded bytes lie: headers and their checks, and the order of the bytes in a block."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import TransferError
from ..wire import FORMAT_HEADER

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

MAGIC = b"EDIFPLN1"
HEADER = struct.Struct("<8sQ")
BLOCK = struct.Struct("<III")
LENGTHS = {stride: struct.Struct(f"<{stride}I") for stride in (2, 4, 8, 1)}
"""The lengths of the coded planes, by stride. Of those that do equally well the first is taken; 1 is the slowest."""
LEAST_BLOCK, LARGEST_BLOCK = 64 * 1024, 64 * 1024 * 1024
"""What a decoder takes: fewer bytes would make a file of headers, more would cost it memory."""


def header(size: int) -> bytes:
    """What the coded bytes of `size` raw bytes begin with."""
    return HEADER.pack(MAGIC, size)


@dataclass(frozen=True)
class Block:
    """Where a block's raw bytes belong, and how many raw and coded ones it has."""

    offset: int
    raw: int
    coded: int
    stride: int


class Plan:
    """Checks headers as they come, so that nothing is allocated that they may not ask for."""

    def __init__(self, head: bytes, limit: int | None) -> None:
        self.size: int
        magic, self.size = HEADER.unpack(head)
        if magic != MAGIC:
            raise TransferError(
                f"The bytes do not begin with {MAGIC.decode()}, so they are no result in the format planes: ask for "
                f"one with the header {FORMAT_HEADER}."
            )
        if limit is not None and self.size > limit:
            raise TransferError(
                f"Decoded, the result would take {self.size} bytes, and no more than {limit} are allowed: "
                "save less, or allow more."
            )
        self.planned = 0
        self._first = 0

    @property
    def complete(self) -> bool:
        return self.planned == self.size

    def block(self, head: bytes) -> Block:
        """The next block by its header."""
        raw, coded, stride = BLOCK.unpack(head)
        left = self.size - self.planned
        if not self._first:
            if raw != left and (raw < LEAST_BLOCK or raw % 64):
                raise damaged(self.planned)
            self._first = raw
        if raw != min(self._first, left) or not 0 < coded <= raw <= LARGEST_BLOCK:
            raise damaged(self.planned)
        if (stride and stride not in LENGTHS) or (stride == 0 and coded != raw):
            raise damaged(self.planned)
        found = Block(self.planned, raw, coded, stride)
        self.planned += raw
        return found


def planes_of(block: Bytes, stride: int) -> Bytes:
    """The planes of a block as rows, without what is left over. By rows numpy copies 5 times as fast as by `.T`."""
    import numpy as np

    words = block[: len(block) // stride * stride].reshape(-1, stride)
    if stride == 1:
        return words.T
    planes = np.empty((stride, len(words)), np.uint8)
    for number in range(stride):
        planes[number] = words[:, number]
    return planes


def damaged(offset: int) -> TransferError:
    return TransferError(f"The result is damaged behind its first {offset} bytes: download it again.")


def cut_off(offset: int) -> TransferError:
    return TransferError(f"The result is cut off behind its first {offset} bytes: download it again.")
