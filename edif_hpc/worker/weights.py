"""One copy of the weights for any number of processes: a sealed anonymous file that everybody maps privately.

The host lays all parameters and buffers into a memfd and seals it, so nothing can write to it any more. Whoever maps it
MAP_PRIVATE may write to its own view: such a write stays in that process. Tensor attributes that are neither parameter
nor buffer travel too, since a meta build would leave them empty.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from edif_hpc.core.errors import HostError

ALIGNMENT = 64
"""A cache line, in bytes."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
PARAMETER, BUFFER, ATTRIBUTE = "parameter", "buffer", "attribute"
Slot = tuple[str, str, str]
"""Module path, kind and name: where in the model a tensor sits."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the file, and its shape."""

    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        return int(torch.Size(self.size).numel())


@dataclass(frozen=True)
class Manifest:
    """What lies where: places by number, and for every slot the number of its place. Two slots with one are tied."""

    places: list[Place]
    slots: dict[Slot, int]
    size: int
    attributes: dict[str, Any]


def export(model: Any) -> tuple[int, int, int]:
    """Move an nnsight model's tensors into a sealed file.

    Each tensor is emptied as soon as it was copied, so that the peak is one model and not two: the model cannot run
    afterwards.

    Returns:
        The weights' descriptor, the manifest's, and the size of the weights in bytes.
    """
    slots, tensors = unique_tensors(model._module)
    places, size = _places(tensors)
    manifest = Manifest(places, slots, size, attributes_of(model))
    fd = os.memfd_create("edif-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, max(size, 1))
    with mmap.mmap(fd, max(size, 1)) as mapping:
        for where, tensor in zip(places, tensors, strict=True):
            _view(mapping, where).copy_(tensor)
            tensor.data = tensor.new_empty(0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    manifest_fd = os.memfd_create("edif-manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(manifest_fd), "wb") as handle:
        pickle.dump(manifest, handle)
    fcntl.fcntl(manifest_fd, fcntl.F_ADD_SEALS, SEALS)
    return fd, manifest_fd, size


def attach(model: Any, weights_fd: int, manifest_fd: int) -> None:
    """Give a model built on meta the weights of a file made by `export`, privately, keeping ties."""
    manifest = attach_module(model._module, weights_fd, manifest_fd)
    adopt(model, manifest.attributes, torch.device("cpu"))


def attach_module(module: torch.nn.Module, weights_fd: int, manifest_fd: int) -> Manifest:
    """The same for the module alone.

    The manifest is unpickled: it must be the host's own, which sealed it before any stranger's code ran.
    """
    size = os.fstat(manifest_fd).st_size  # read at its own offset: several processes read one open file
    manifest: Manifest = pickle.loads(os.pread(manifest_fd, size, 0))  # noqa: S301 - written by the host, see above
    check_same_tree(module, manifest.slots)
    mapping = mmap.mmap(
        weights_fd, max(manifest.size, 1), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
    parameters = {number for (_, kind, _), number in manifest.slots.items() if kind == PARAMETER}
    place(module, manifest.slots, [_view(mapping, where) for where in manifest.places], parameters)
    return manifest


# -- shared with device_weights ---------------------------------------------------------------------------------------


def unique_tensors(module: torch.nn.Module) -> tuple[dict[Slot, int], list[torch.Tensor]]:
    """Every tensor once, and for every slot the number of the tensor in it."""
    slots: dict[Slot, int] = {}
    tensors: list[torch.Tensor] = []
    numbers: dict[tuple[Any, ...], int] = {}
    for slot, tensor in _tensors(module):
        same: tuple[Any, ...] = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0:
            same = (id(tensor),)
        if same not in numbers:
            numbers[same] = len(tensors)
            tensors.append(tensor)
        slots[slot] = numbers[same]
    return slots, tensors


def attributes_of(model: Any) -> dict[str, Any]:
    """What loading sets on model and pipeline besides tensors, and building on meta does not."""
    return {
        "generation_config": getattr(model._module, "generation_config", None),
        "pipeline_generation_config": getattr(model.pipeline, "generation_config", None),
    }


def adopt(model: Any, attributes: dict[str, Any], device: torch.device) -> None:
    module, pipeline = model._module, model.pipeline
    if attributes["generation_config"] is not None:
        module.generation_config = attributes["generation_config"]
    if attributes["pipeline_generation_config"] is not None:
        pipeline.generation_config = attributes["pipeline_generation_config"]
    pipeline.device = device
    module.eval()  # a model built from its config alone is in training mode
    model.dispatched = True


def place(module: torch.nn.Module, slots: dict[Slot, int], tensors: list[torch.Tensor], parameters: set[int]) -> None:
    """Put tensors into a module tree; those with a number in `parameters` as such, one object for all their slots."""
    wrapped = {number: torch.nn.Parameter(tensors[number], requires_grad=False) for number in parameters}
    for (path, kind, name), number in slots.items():
        owner = module.get_submodule(path)
        if kind == PARAMETER:
            owner._parameters[name] = wrapped[number]
        elif kind == BUFFER:
            owner._buffers[name] = tensors[number]
        else:
            owner.__dict__[name] = tensors[number]


def check_same_tree(module: torch.nn.Module, slots: dict[Slot, int]) -> None:
    expected = {slot for slot in slots if slot[1] != ATTRIBUTE}
    built = {slot for slot, _ in _tensors(module) if slot[1] != ATTRIBUTE}
    if expected != built:
        path, kind, name = min(expected ^ built)
        raise HostError(
            f"The model as loaded and as built from its config differ in the {kind} {path}.{name}: "
            "serve this model at isolation none."
        )


def _tensors(module: torch.nn.Module) -> Iterator[tuple[Slot, torch.Tensor]]:
    for path, owner in module.named_modules():
        for kind, table in ((PARAMETER, owner._parameters), (BUFFER, owner._buffers), (ATTRIBUTE, owner.__dict__)):
            for name, tensor in table.items():
                if isinstance(tensor, torch.Tensor):
                    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                        raise HostError(
                            f"{path}.{name} is a {type(tensor).__name__}, which executors cannot share yet: "
                            "serve this model at isolation none, or unquantised."
                        )
                    yield (path, kind, name), tensor


# -- the file ---------------------------------------------------------------------------------------------------------


def _places(tensors: list[torch.Tensor]) -> tuple[list[Place], int]:
    """Lay tensors out, each at the offset within a cache line that it has now.

    A checkpoint that was mapped rarely starts on one, and matrix kernels take other paths for other offsets: aligned
    anew, a model's logits differed from a local run's by 1e-6.
    """
    places: list[Place] = []
    end = 0
    for tensor in tensors:
        offset = end + (tensor.data_ptr() - end) % ALIGNMENT
        places.append(Place(offset, tensor.dtype, tuple(tensor.shape), _stride(tensor)))
        end = offset + tensor.numel() * tensor.element_size()
    return places, end


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides if it is dense, so that the arithmetic takes the same path; else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride())


def _view(mapping: mmap.mmap, where: Place) -> torch.Tensor:
    if where.elements == 0:
        return torch.empty(where.size, dtype=where.dtype)
    flat = torch.frombuffer(mapping, dtype=where.dtype, count=where.elements, offset=where.offset)
    return flat.as_strided(where.size, where.stride)
