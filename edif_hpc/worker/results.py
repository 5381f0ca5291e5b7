"""What a block saved, as the bytes that the client loads, written straight into an open file of limited size.

Tensors go to the CPU, detached, and compact: a saved view must not drag its whole storage along, while tensors that
share a storage they fill are stored once. A stock client that compresses gets one zstd frame that carries its size,
which it decompresses in one call; `planes` are coded while torch writes, so that nothing is in memory twice.
"""

from __future__ import annotations

import io
import os
import pickle
from types import ModuleType
from typing import IO, Any, cast

import numpy as np  # noqa: F401 - for planes: before the lock-down, and before the first request waits for it
import torch
import zstandard

from edif_hpc.core import planes
from edif_hpc.core.wire import ResultFormat
from edif_hpc.worker.ends import size_text
from edif_hpc.worker.failures import Refusal

LEVEL = 1
"""zstd: 140 MB of float32 take 0.3 to 0.7 s on one core; level 3 takes 1.2 s and saves 2 % more, level -1 0.6 s."""
PROTOCOL = 4
"""Of pickles: large values take one copy less than with torch's own default."""
CHUNK = 1024 * 1024
PARALLEL_BYTES = 4 * CHUNK
"""Below this, compressing in one piece is quicker: neither threads to start nor large buffers to fault in."""


def write(saved: dict[str, Any], fd: int, form: ResultFormat, limit: int, threads: int = 1) -> int:
    """Write the saved values and return how many bytes they take.

    A result that is a FILE is what torch.save writes by itself: older pickles, which torch.load reads without a word.

    Raises:
        Refusal: they are larger than `limit`, or one of them cannot be sent.
    """
    target = _Bounded(fd, limit)
    if form is ResultFormat.PLANES:
        _save_planes(saved, target, threads)
    elif form is ResultFormat.ZSTD:
        plain = io.BytesIO()
        _save(saved, plain)
        _compress(plain, target, threads)
    else:
        _save(saved, target, protocol=torch.serialization.DEFAULT_PROTOCOL if form is ResultFormat.FILE else PROTOCOL)
    if target.size > limit:
        raise Refusal(
            f"The saved values take more than the limit of {size_text(limit)}: save fewer or smaller tensors, "
            "for example only the positions you need."
        )
    return target.size


class _Bounded(io.RawIOBase):
    """Writes into a descriptor up to a limit and only counts beyond it: torch's writer survives no exception."""

    def __init__(self, fd: int, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._fd = fd

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        start, self.size = self.size, self.size + len(view)
        if self.size <= self.limit:
            self.put(view, start)
        return len(view)

    def put(self, view: Any, at: int) -> None:
        """Write at a place; what was written there before is replaced."""
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], at + done)


def _save(saved: dict[str, Any], target: Any, protocol: int = PROTOCOL) -> None:
    try:
        torch.save(saved, target, pickle_module=_compacting_pickle(protocol), pickle_protocol=protocol)
    except MemoryError:
        raise
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        name = _culprit(saved)
        raise Refusal(
            f"The saved value {name!r} cannot be sent back ({type(error).__name__}: {str(error)[:300]}): "
            "save tensors, numbers, texts, or lists and dicts of them."
        ) from error


class _Coding(io.RawIOBase):
    """Codes what torch writes, and keeps an error for later: torch's writer survives no exception."""

    def __init__(self, encoder: planes.Encoder) -> None:
        self.trouble: Exception | None = None
        self._encoder = encoder

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.trouble is None:
            try:
                self._encoder.write(data)
            except Exception as error:  # noqa: BLE001 - raised again when torch has come to its end
                self.trouble = error
        return memoryview(data).nbytes


def _save_planes(saved: dict[str, Any], target: _Bounded, threads: int) -> None:
    """Seconds on one thread, torch's part included, and those of a zstd frame: 37 MB of bf16 hidden states 0.09 and
    0.12, 140 MB of float32 0.23 and 0.37. No copy of what is saved is made beside some blocks."""
    target.write(planes.header(0))  # how much there will be, torch says by writing it
    encoder = planes.Encoder(target.write, threads)
    try:
        coding = _Coding(encoder)
        _save(saved, coding)
        if coding.trouble is not None:
            raise coding.trouble
        encoder.finish()
    finally:
        encoder.close()
    if target.size <= target.limit:
        target.put(planes.header(encoder.size), 0)


def _compress(plain: io.BytesIO, target: _Bounded, threads: int) -> None:
    size = plain.getbuffer().nbytes
    if size < PARALLEL_BYTES:
        target.write(zstandard.ZstdCompressor(level=LEVEL).compress(plain.getbuffer()))
        return
    plain.seek(0)
    zstandard.ZstdCompressor(level=LEVEL, threads=threads if threads > 1 else 0).copy_stream(
        plain, cast("IO[bytes]", target), size=size, read_size=CHUNK, write_size=CHUNK
    )


def _compacting_pickle(protocol: int = PROTOCOL) -> ModuleType:
    """A stand-in for the pickle module: torch.save takes its Pickler from there, and this one sends tensors compact."""
    compact: dict[tuple[Any, ...], torch.Tensor] = {}

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return NotImplemented
            whole = _whole(value)
            # The pickler keeps `value`, so its address is no other's; one gathered just now may be followed by another.
            small = _compacted(whole, compact if whole is value else {})
            # torch annotates neither this method nor, below, a module of our making.
            return NotImplemented if small is value else small.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    module = ModuleType("edif_hpc_compacting_pickle")
    vars(module).update(vars(pickle))
    module.Pickler = Pickler  # type: ignore[attr-defined]  # nor this, see above
    return module


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """What all ranks of a split model hold of it together; any other tensor as it is. Every rank has to come here."""
    if not hasattr(tensor, "full_tensor"):  # a DTensor, whose module takes long to import
        return tensor
    whole: torch.Tensor = tensor.full_tensor().detach()
    kept = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(whole, tensor.requires_grad) if kept else whole


def _compacted(tensor: torch.Tensor, compact: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    """The tensor itself if it is on the CPU and fills its storage, else a copy; equal views get the same copy."""
    if tensor.is_sparse or tensor.is_quantized or tensor.layout is not torch.strided:
        return tensor if tensor.device.type in ("cpu", "meta") else tensor.cpu()
    storage = tensor.untyped_storage()
    fills = tensor.numel() * tensor.element_size() >= storage.nbytes()
    plain = not tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
    if fills and plain and tensor.device.type in ("cpu", "meta"):
        return tensor
    key = (id(type(tensor)), storage.data_ptr(), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
    if key not in compact:
        detached = tensor.detach()
        on_cpu = detached.cpu() if detached.device.type != "meta" else detached
        small = on_cpu if fills or on_cpu is not detached else on_cpu.clone(memory_format=torch.contiguous_format)
        kept = isinstance(tensor, torch.nn.Parameter)
        compact[key] = torch.nn.Parameter(small, tensor.requires_grad) if kept else small
    return compact[key]


def _culprit(saved: dict[str, Any]) -> str:
    """The first saved name that cannot be pickled by itself."""
    for name, value in saved.items():
        try:
            torch.save(value, io.BytesIO(), pickle_module=_compacting_pickle())
        except Exception:  # noqa: BLE001 - only asking which one it is; the error itself is reported by the caller
            return name
    return next(iter(saved), "?")
