"""What it means that a GPU is divided: an AMD Instinct GPU in a partition mode, an NVIDIA GPU in MIG mode. Pure.

In every mode but SPX one AMD GPU is several devices, and the driver gives each an equal share of its memory, whatever
the memory mode (NPS): amdgpu_amdkfd_xcp_memory_size in the kernel's amdgpu_amdkfd.c. rocm-smi shows the whole for each
all the same (github.com/ROCm/legacy-rocm-build/issues/4750), some releases of amd-smi the share
(github.com/ROCm/amdsmi/issues/97 and 132).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edif_hpc.hardware.profiles import MIB, Device

PARTS = {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4, "CPX": 8}
"""Devices that one GPU becomes; in CPX one for each compute die."""
DIES = {"MI300A": 6}
"""Where there are others than eight: AMD's overview of the MI300A."""
WHOLE = {"MI300A": 128, "MI300X": 192, "MI325X": 256, "MI350X": 288, "MI355X": 288}
"""GiB of memory on one GPU, by AMD's data sheets: what tells a share from the whole."""
NEARLY = 0.6
"""Of a whole GPU: above it a size cannot be a share, since the largest share is a half. Drivers keep some back."""


@dataclass(frozen=True)
class Modes:
    """The modes of a machine's AMD GPUs, each sorted: compute ("SPX", "CPX") and memory ("NPS1", "NPS4")."""

    compute: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()


def shared_out(devices: tuple[Device, ...], modes: Modes) -> tuple[Device, ...]:
    """The same devices with the memory that each can really allocate.

    Where GPUs of one machine are in different modes nothing tells which device is in which: all are taken for the
    smallest, which costs room and never a crash.
    """
    return tuple(replace(device, memory_bytes=_share(device, modes)) for device in devices)


def _share(device: Device, modes: Modes) -> int:
    parts = parts_of(device.name, modes)
    whole = next((size * 1024 * MIB for name, size in WHOLE.items() if name in device.name), 0)
    if parts == 1 or device.memory_bytes < NEARLY * whole:
        return device.memory_bytes
    return device.memory_bytes // parts


def parts_of(name: str, modes: Modes) -> int:
    """Into how many devices a GPU of this name is divided, at most."""
    dies = next((count for model, count in DIES.items() if model in name), PARTS["CPX"])
    return max((dies if mode == "CPX" else PARTS.get(mode, 1) for mode in modes.compute), default=1)


def notes(devices: tuple[Device, ...], modes: Modes) -> list[str]:
    """Sentences for `doctor` about devices that are parts of GPUs; none where they are whole."""
    found = []
    parts = max((parts_of(device.name, modes) for device in devices), default=1)
    if parts > 1:
        mode = ", ".join((*modes.compute, *modes.memory))
        least = min(device.memory_bytes for device in devices) / 1024 / MIB
        found.append(
            f"The GPUs are partitioned ({mode}): a device is one of {parts} parts of a GPU and has {least:.1f} GiB, "
            "although rocm-smi may show the whole GPU's memory for each. SPX makes one device of a GPU."
        )
    slices = [device for device in devices if device.slice]
    if len(slices) > 1:
        found.append(
            f"{len(slices)} MIG slices are visible, and CUDA gives a process the first of them alone, so a worker uses "
            "no other; ask Slurm for one slice an allocation."
        )
    return found
