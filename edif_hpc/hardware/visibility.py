"""Which of a machine's devices this process may use: CUDA_VISIBLE_DEVICES and its relatives, decided without running.

Slurm sets these. On AMD three of them apply one after the other, each counting what the one before left over, so two
that look alike can hide every GPU; that is refused here, before it becomes "no device found" inside torch.

GPU_DEVICE_ORDINAL, which Slurm may set beside them, is not counted: HIP does not read it, OpenCL does (ROCm's clr,
rocdevice.cpp). There too HIP_VISIBLE_DEVICES, unless it is empty, takes the place of CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

from collections.abc import Mapping

from edif_hpc.core.errors import SettingsError
from edif_hpc.hardware.profiles import Device, Profile

NONE = frozenset({"", "-1", "NoDevFiles", "none", "void"})
"""What stands for "no device": an empty value, Slurm's word, and those of the container toolkits."""


def visible(profile: Profile, devices: tuple[Device, ...], environment: Mapping[str, str]) -> tuple[Device, ...]:
    """The devices that are left, in the order in which torch will count them.

    Raises:
        SettingsError: two variables contradict each other.
    """
    given = {name: environment[name].strip() for name in profile.visibility if name in environment}
    if len(given) > 1 and not _harmless(list(given.values())):
        first, *others = given
        told = " and ".join(f"{name}={value}" for name, value in given.items())
        raise SettingsError(
            f"{told} are set together, and each counts only what the one before left over, so GPUs vanish; "
            f"keep {first} and unset {' and '.join(others)}."
        )
    for value in list(given.values())[:1]:
        devices = _chosen(devices, value)
    return devices


def _harmless(values: list[str]) -> bool:
    """All the same and counting up from zero: applied twice, that changes nothing."""
    identity = ",".join(str(index) for index in range(values[0].count(",") + 1))
    return all(value == identity for value in values)


def _chosen(devices: tuple[Device, ...], value: str) -> tuple[Device, ...]:
    if value in NONE:
        return ()
    if value == "all":
        return devices
    chosen: list[Device] = []
    for token in (part.strip() for part in value.split(",")):
        found = _named(devices, token, taken=chosen)
        if found is None:
            break  # as the CUDA runtime does: what follows an invalid entry does not count
        chosen.append(found)
    return tuple(chosen)


def _named(devices: tuple[Device, ...], token: str, taken: list[Device]) -> Device | None:
    if token.isdigit():
        return devices[int(token)] if int(token) < len(devices) else None
    if token.startswith("MIG-"):
        # nvidia-smi's XML names no slice by its uuid; the smallest one left is what can be promised.
        slices = [device for device in devices if device.slice and device not in taken]
        return min(slices, key=lambda device: device.memory_bytes, default=None)
    return next((device for device in devices if token and device.uuid.startswith(token)), None)
