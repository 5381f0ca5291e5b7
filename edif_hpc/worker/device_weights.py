"""Weights on a CUDA or HIP device for several processes. NOT RUN YET on any device, only on shared memory of a CPU.

The host keeps the weights on the device and hands out IPC handles; each executor opens them after it was forked and
locked down, because a process that touched the device may not fork. Such memory cannot be sealed: an executor can write
to everybody's weights. So the host keeps a keyed checksum, compares it when a run has ended, and ends itself when it
differs; the agent then starts another host, and what ran meanwhile is tried again. A write that is undone before the
run ends is not noticed.
"""

from __future__ import annotations

import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from edif_hpc.worker.weights import PARAMETER, Slot, adopt, attributes_of, check_same_tree, place, unique_tensors

CHUNK = 4 * 1024 * 1024
"""Elements per step of the checksum: 32 MiB beside the weights."""
NODES = ("nvidia*", "kfd", "dri/*")


def export(model: Any) -> tuple[int, int]:
    """The descriptor of a manifest with one IPC handle per tensor, and the size of the weights in bytes."""
    slots, tensors = unique_tensors(model._module)
    # torch.multiprocessing has no annotations.
    handles = [reduce_tensor(tensor.detach()) for tensor in tensors]  # type: ignore[no-untyped-call]
    manifest = os.memfd_create("edif-handles", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(manifest), "wb") as handle:
        # multiprocessing's own: of memory shared on a CPU it writes the name, as of a device's the IPC handle.
        ForkingPickler(handle).dump((slots, handles, attributes_of(model)))
    return manifest, sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def attach(model: Any, manifest_fd: int, device: str) -> None:
    """Give a model built on meta the weights. The manifest is the host's own, read before any stranger's code."""
    slots: dict[Slot, int]
    with os.fdopen(os.dup(manifest_fd), "rb") as handle:
        handle.seek(0)
        slots, handles, attributes = pickle.load(handle)  # noqa: S301 - see the docstring
    check_same_tree(model._module, slots)
    parameters = {number for (_, kind, _), number in slots.items() if kind == PARAMETER}
    tensors = [rebuild(*args) for rebuild, args in handles]
    place(model._module, slots, tensors, parameters)
    adopt(model, attributes, torch.device(device))


def nodes() -> tuple[Path, ...]:
    """The device files that an executor must be able to open."""
    return tuple(path for pattern in NODES for path in sorted(Path("/dev").glob(pattern)))


class Checksum:
    """A keyed sum over all weights; without the key, which stays in the host, no change keeps it."""

    def __init__(self, model: Any) -> None:
        _, self._tensors = unique_tensors(model._module)
        self._keys: dict[torch.device, torch.Tensor] = {}
        self._expected = self._sums()

    def intact(self) -> bool:
        return self._sums() == self._expected

    def _sums(self) -> list[int]:
        return [self._sum(tensor) for tensor in self._tensors]

    def _sum(self, tensor: torch.Tensor) -> int:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = data[: data.numel() // 8 * 8].view(torch.int64)
        tail = data[whole.numel() * 8 :].to(torch.int64)
        key = self._key(tensor.device)
        parts = [*torch.split(whole, CHUNK), tail]
        return sum(int((part * key[: part.numel()]).sum()) for part in parts if part.numel()) & (2**64 - 1)

    def _key(self, device: torch.device) -> torch.Tensor:
        """Odd numbers, so that every single changed bit changes the sum."""
        if device not in self._keys:
            random = torch.frombuffer(bytearray(os.urandom(CHUNK * 8)), dtype=torch.int64)
            self._keys[device] = (random | 1).to(device)
        return self._keys[device]
