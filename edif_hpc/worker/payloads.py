"""A request's payload, from an open file to the bytes that nnsight unpickles, never larger than its limit.

It is decompressed in bounded steps before anything looks inside: a few kilobytes of zstd can announce, or unfold into,
any amount of memory.
"""

from __future__ import annotations

import os
import pickle

import zstandard
from nnsight.intervention.serialization import UnknownPersistentIdError

from edif_hpc.worker.ends import size_text
from edif_hpc.worker.failures import Refusal

WINDOW_BYTES = 128 * 1024 * 1024
"""The decoder's working memory; zstd-6, which nnsight sends, needs 2 MiB."""


def read(fd: int, compressed: bool, limit: int) -> bytes:
    """The payload's plain bytes.

    Raises:
        Refusal: it is damaged, or larger than `limit` when unpacked.
    """
    size = os.fstat(fd).st_size
    if size > limit:
        raise Refusal(too_large(limit))
    data = _read_all(fd, size)
    return _unpack(data, limit) if compressed else data


def too_large(limit: int) -> str:
    return (
        f"The request's payload is larger than the limit of {size_text(limit)} when unpacked: "
        "send less data with the block."
    )


def refusal(error: Exception) -> Refusal:
    """The sentence for an error that was raised while a payload was turned back into a block."""
    if isinstance(error, UnknownPersistentIdError):
        return Refusal(
            f"The block names {str(error)[:200]!r}, which the served model does not have: the model was built "
            "differently on your side, nearly always by another transformers version; compare with nnsight.compare()."
        )
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "?").partition(".")[0]
        return Refusal(
            f"The block uses the module {name!r}, which this service does not have: ship it with the request by "
            f"calling nnsight.register({name!r}) first."
        )
    if isinstance(error, PermissionError):
        return Refusal(
            f"The block needs the file {error.filename!r}, which code may not read here: ship your own modules with "
            "the request by calling nnsight.register() on them first."
        )
    if isinstance(error, (pickle.UnpicklingError, EOFError)):
        return Refusal(f"The request's payload is damaged and cannot be read ({_short(error)}): send it again.")
    return Refusal(
        f"The request's payload cannot be turned back into a block ({type(error).__name__}: {_short(error)}): "
        "send it again, and compare versions with nnsight.compare()."
    )


def _read_all(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    done = 0
    while done < size:
        part = os.pread(fd, size - done, done)
        if not part:
            raise Refusal("The request's payload is shorter than it was announced: send it again.")
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unpack(data: bytes, limit: int) -> bytes:
    try:
        announced = zstandard.frame_content_size(data)
        if announced > limit:
            raise Refusal(too_large(limit))
        decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
        if announced >= 0:
            return decoder.decompress(data)
        with decoder.stream_reader(data) as reader:
            plain = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise Refusal(f"The request's payload is no complete zstd frame ({_short(error)}): send it again.") from error
    if len(plain) > limit:
        raise Refusal(too_large(limit))
    return plain


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
