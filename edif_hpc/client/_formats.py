"""How a result's bytes are packed, undone: the one seam between downloading and loading.

Inside is always the file that torch.save wrote. Around it may be nothing, one zstd frame, or byte planes
(`edif_hpc.core.planes`), which older services do not know. Which one it is, the first bytes tell; what the service says
of it is not needed. What it must not know: where bytes come from.
"""

from __future__ import annotations

import os
from pathlib import Path

from edif_hpc.core.errors import TransferError

from ._errors import DownloadFailed

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHUNK = 1024 * 1024


def wanted() -> dict[str, str]:
    """Headers of a submission that ask for the densest packing this client can undo."""
    return {"edif-result-format": "planes"}


def packing(first: bytes | bytearray) -> str:
    """`zstd`, `planes` or `plain`, by the first 8 bytes."""
    from edif_hpc.core import planes  # here and below: it brings pydantic, which only results need

    if first.startswith(planes.MAGIC):
        return "planes"
    return "zstd" if first.startswith(ZSTD_MAGIC) else "plain"


def unpack(packed: bytes | bytearray) -> bytes | bytearray:
    """The torch.save file, in memory."""
    how = packing(packed[:8])
    if how == "plain":
        return packed
    if how == "planes":
        from edif_hpc.core import planes

        try:
            return planes.decode(packed)
        except TransferError as error:
            raise DownloadFailed(str(error)) from None
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
        from edif_hpc.core import planes

        try:
            planes.decode_file(packed, draft, threads)
        except TransferError as error:
            raise DownloadFailed(f"{str(error).rstrip('.')}; remove {packed} first.") from None
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


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
