"""Which part of a model lives on which device, when none of them has room for all of it: layer by layer.

accelerate computes the map from a model on meta and byte budgets; nothing is loaded and no device is touched. Then it
is checked here: nothing left over for host memory or disk, every budget kept, and all names of one tied weight on one
device. A weight whose names lie on two devices is either there twice, so that training one leaves the other, or read
on the wrong device, which ends the process.

Not run on any device yet: the maps are tested on meta, their way into a loaded model on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import find_tied_parameters, get_balanced_memory

from edif_hpc.core.errors import HostError
from edif_hpc.hardware.memory import gib

FILLED = (0.7, 0.8, 0.9, 1.0)
"""Shares of the devices' room that are tried one after the other: the emptier all are, the longer a prompt may be."""
Numbered = dict[str, int]
"""Module path -> a device by its number, as accelerate has them."""


def place(module: Any, budgets: Mapping[str, int], name: str) -> dict[str, str]:
    """The device map of a model on meta.

    Args:
        module: a transformers model; its `_no_split_modules` name the layers that stay whole.
        budgets: torch device -> bytes that weights may take there; two devices at least.
        name: the model's, for the refusal.

    Returns:
        module or parameter path -> torch device. Embeddings lie on the first device, where inputs arrive.

    Raises:
        HostError: it does not fit, with figures.
    """
    devices = list(budgets)
    room = dict(enumerate(budgets.values()))
    whole = {*(getattr(module, "_no_split_modules", None) or ())}
    sizes = _parts(module, whole)
    balanced = get_balanced_memory(module, max_memory=dict(room), no_split_module_classes=list(whole))
    # Evenly first, then ever fuller. On the first device accelerate keeps free what the largest part still to come has,
    # for parts that it would fetch from host memory; here are none, so that is added, and too much is found below.
    fuller = [{number: int(size * share) for number, size in room.items()} for share in FILLED]
    fullest = [{**room, 0: room[0] + size} for size in sorted(set(sizes.values()))]
    for limits in (balanced, *fuller, *fullest):
        # Unclean, so that each entry is a module that is never cut further and can be moved by itself.
        found: Numbered = infer_auto_device_map(
            module,
            max_memory=dict(limits),
            no_split_module_classes=list(whole),
            clean_result=False,
            offload_buffers=True,
        )
        if set(found.values()) <= room.keys() and not split_ties(module, found) and _keeps(module, found, room):
            return {path: devices[number] for path, number in found.items()}
    raise HostError(
        f"{name} has {gib(sum(bytes_by_device(module, {'': 0}).values()))} of weights and cannot be spread over "
        f"{' and '.join(f'{device} with room for {gib(size)}' for device, size in budgets.items())}: its layers stay "
        f"whole, the largest part has {gib(max(sizes.values()))}, and tied weights stay together. It takes more or "
        "larger devices."
    )


def check_ties(shape: Any, loaded: Any) -> None:
    """Refuse a model whose tied weights came apart when it was loaded.

    Raises:
        HostError: naming two names of what is one weight in the model's shape.
    """
    for group in find_tied_parameters(shape):
        first, *others = group
        apart = [name for name in others if loaded.get_parameter(name) is not loaded.get_parameter(first)]
        if apart:
            raise HostError(f"{first} and {apart[0]} are one weight and were loaded as two, so nothing is served.")


def split_ties(module: Any, devices: Mapping[str, Any]) -> list[list[str]]:
    """The groups of names of one weight that this map lays on different devices."""
    groups: list[list[str]] = find_tied_parameters(module)
    return [group for group in groups if len({device_of(name, devices) for name in group}) > 1]


def bytes_by_device(module: Any, devices: Mapping[str, Any]) -> dict[Any, int]:
    """What each device holds under this map: every tensor once, buffers included."""
    found: dict[Any, int] = {}
    seen: set[int] = set()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            device = device_of(name, devices)
            found[device] = found.get(device, 0) + tensor.numel() * tensor.element_size()
    return found


def device_of(name: str, devices: Mapping[str, Any]) -> Any:
    """Where a tensor of this name lies: by the longest path in the map that leads to it.

    Raises:
        KeyError: none does.
    """
    path = name
    while path not in devices:
        if not path:
            raise KeyError(name)
        path = path.rpartition(".")[0]
    return devices[path]


def _keeps(module: Any, found: Numbered, room: Mapping[int, int]) -> bool:
    return all(size <= room[number] for number, size in bytes_by_device(module, found).items())


def _parts(module: Any, whole: set[str]) -> dict[str, int]:
    """The size of each part that stays whole: layers by their class, and what has tensors and lies in none of them."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{layer}.") for layer in found)
        if not inside and (type(part).__name__ in whole or not list(part.children())):
            tensors: list[torch.Tensor] = [*part.parameters(), *part.buffers()]
            found[path] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return found
