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
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
PARAMETER, BUFFER, ATTRIBUTE = "parameter", "buffer", "attribute"


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
    """What lies where: places by number, and for every (module path, kind, name) the number of its place.

    Two names with one number are tied. `attributes` are those of the model that a meta build does not know.
    """

    places: list[Place]
    slots: dict[tuple[str, str, str], int]
    size: int
    attributes: dict[str, Any]


def export(model: Any) -> tuple[int, int, int]:
    """Move an nnsight model's tensors into a sealed file.

    Each tensor is emptied as soon as it was copied, so that the peak is one model and not two: the model cannot run
    afterwards.

    Returns:
        The weights' descriptor, the manifest's, and the size of the weights in bytes.
    """
    module = model._module
    places, slots, tensors, size = _plan(module)
    attributes = {
        "generation_config": getattr(module, "generation_config", None),
        "pipeline_generation_config": getattr(model.pipeline, "generation_config", None),
    }
    fd = os.memfd_create("edif-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, max(size, 1))
    with mmap.mmap(fd, max(size, 1)) as mapping:
        for place, tensor in zip(places, tensors, strict=True):
            _view(mapping, place).copy_(tensor)
            tensor.data = tensor.new_empty(0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    manifest = os.memfd_create("edif-manifest", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(manifest), "wb") as handle:
        pickle.dump(Manifest(places, slots, size, attributes), handle)
    return fd, manifest, size


def attach(model: Any, weights_fd: int, manifest_fd: int) -> None:
    """Give a model built on meta the weights of a file made by `export`, privately, keeping ties.

    The manifest is unpickled: it must come from the host, before any stranger's code ran.
    """
    os.lseek(manifest_fd, 0, os.SEEK_SET)
    with os.fdopen(os.dup(manifest_fd), "rb") as handle:
        manifest: Manifest = pickle.load(handle)  # noqa: S301 - written by the host, see above
    module = model._module
    _check_same_tree(module, manifest)
    mapping = mmap.mmap(
        weights_fd, max(manifest.size, 1), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
    views = [_view(mapping, place) for place in manifest.places]
    parameters = {
        number: torch.nn.Parameter(views[number], requires_grad=False)
        for (_, kind, _), number in manifest.slots.items()
        if kind == PARAMETER
    }
    for (path, kind, name), number in manifest.slots.items():
        owner = module.get_submodule(path)
        if kind == PARAMETER:
            owner._parameters[name] = parameters[number]
        elif kind == BUFFER:
            owner._buffers[name] = views[number]
        else:
            owner.__dict__[name] = views[number]
    _attach_attributes(model, manifest.attributes)


def _attach_attributes(model: Any, attributes: dict[str, Any]) -> None:
    module, pipeline = model._module, model.pipeline
    if attributes["generation_config"] is not None:
        module.generation_config = attributes["generation_config"]
    if attributes["pipeline_generation_config"] is not None:
        pipeline.generation_config = attributes["pipeline_generation_config"]
    pipeline.device = torch.device("cpu")
    module.eval()  # a model built from its config alone is in training mode
    model.dispatched = True


def _plan(module: torch.nn.Module) -> tuple[list[Place], dict[tuple[str, str, str], int], list[torch.Tensor], int]:
    places: list[Place] = []
    slots: dict[tuple[str, str, str], int] = {}
    tensors: list[torch.Tensor] = []
    numbers: dict[tuple[Any, ...], int] = {}
    size = 0
    for slot, tensor in _tensors(module):
        same: tuple[Any, ...] = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0:
            same = (id(tensor),)
        if same not in numbers:
            numbers[same] = len(places)
            places.append(Place(size, tensor.dtype, tuple(tensor.shape), _stride(tensor)))
            tensors.append(tensor)
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        slots[slot] = numbers[same]
    return places, slots, tensors, size


def _tensors(module: torch.nn.Module) -> Iterator[tuple[tuple[str, str, str], torch.Tensor]]:
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


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides if it is dense, so that the arithmetic takes the same path; else contiguous ones."""
    return tuple(torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride())


def _view(mapping: mmap.mmap, place: Place) -> torch.Tensor:
    if place.elements == 0:
        return torch.empty(place.size, dtype=place.dtype)
    flat = torch.frombuffer(mapping, dtype=place.dtype, count=place.elements, offset=place.offset)
    return flat.as_strided(place.size, place.stride)


def _check_same_tree(module: torch.nn.Module, manifest: Manifest) -> None:
    expected = {slot for slot in manifest.slots if slot[1] != ATTRIBUTE}
    built = {slot for slot, _ in _tensors(module) if slot[1] != ATTRIBUTE}
    if expected != built:
        path, kind, name = min(expected ^ built)
        raise HostError(
            f"The model as loaded and as built from its config differ in the {kind} {path}.{name}: "
            "serve this model at isolation none."
        )
