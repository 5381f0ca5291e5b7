"""How a result's bytes are packed, undone: the one seam between downloading and loading.

Inside is always the file that torch.save wrote. Around it may be nothing, one zstd frame, or byte planes, where a
service and this client both know them (`edif_hpc.core.planes`). Which one it is, the first bytes tell; what the
service says of it is not needed. What it must not know: where bytes come from.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from ._errors import DownloadFailed

PLANES_MODULE = "edif_hpc.core.planes"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
PLANES_MAGIC = b"EDIFPLN1"
CHUNK = 1024 * 1024


def wanted() -> dict[str, str]:
    """Headers of a submission that ask for the densest packing this client can undo."""
    return {"edif-result-format": "planes"} if importlib.util.find_spec(PLANES_MODULE) else {}


def packing(first: bytes | bytearray) -> str:
    """`zstd`, `planes` or `plain`, by the first 8 bytes."""
    if first.startswith(PLANES_MAGIC):
        return "planes"
    return "zstd" if first.startswith(ZSTD_MAGIC) else "plain"


def unpack(packed: bytes | bytearray) -> bytes | bytearray:
    """The torch.save file, in memory."""
    how = packing(packed[:8])
    if how == "plain":
        return packed
    if how == "planes":
        return _unpack_planes(packed)
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise DownloadFailed(f"The result is no whole zstd frame ({error}); fetch it again.") from None


def unpack_file(packed: Path, target: Path, threads: int) -> None:
    """The torch.save file at `target`; `packed` is gone afterwards. `target` appears whole or not at all."""
    with packed.open("rb") as file:
        how = packing(file.read(8))
    if how == "plain":
        packed.replace(target)
        return
    draft = target.with_name(f"{target.name}.unpacking")
    if how == "planes":
        _planes().decode_file(packed, draft, threads)
    else:
        _unpack_zstd(packed, draft)
    draft.replace(target)
    packed.unlink()


def _unpack_zstd(packed: Path, draft: Path) -> None:
    import zstandard

    try:
        with packed.open("rb") as source, draft.open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target, read_size=CHUNK, write_size=CHUNK)
    except zstandard.ZstdError as error:
        raise DownloadFailed(
            f"The result in {packed} is no whole zstd frame ({error}); remove it and try again."
        ) from None


def _unpack_planes(packed: bytes | bytearray) -> bytearray:
    decoder, plain = _planes().Decoder(), bytearray()
    for offset, piece in decoder.feed(packed):
        if offset + len(piece) > len(plain):
            plain.extend(bytes(offset + len(piece) - len(plain)))
        plain[offset : offset + len(piece)] = piece
    return plain


def _planes() -> Any:
    try:
        return importlib.import_module(PLANES_MODULE)
    except ImportError:
        raise DownloadFailed("The result is packed in a way that this client does not know; update edif_hpc.") from None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
