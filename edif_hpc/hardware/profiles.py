"""What differs between CUDA, ROCm and CPU, as data: the rest of the project asks here instead of testing for names.

Pure: nothing here looks at the machine (`detect` does).
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1024**2


@dataclass(frozen=True)
class Profile:
    """One kind of accelerator.

    Args:
        torch_device: torch's name of it; a ROCm build of torch also calls its devices "cuda".
        visibility: the variables that hide devices from a process, in the order in which the runtime applies them.
        apptainer: the options that bring host devices and libraries into a container.
        runtime_bytes: what a served model costs beside its weights, in bytes.
    """

    name: str
    torch_device: str
    visibility: tuple[str, ...]
    apptainer: tuple[str, ...]
    runtime_bytes: int


PROFILES = {
    profile.name: profile
    for profile in (
        # A model host with torch, transformers and nnsight measured 370 MiB resident (Debian 12, torch 2.13, tiny
        # GPT-2); the rest is room for its zygote and one executor, whose imports are mostly shared pages.
        Profile("cpu", "cpu", (), (), 768 * MIB),
        # An estimate, not measured by this project: two processes that use the device (host and executor) at about
        # 500 MiB of context each, and cuBLAS workspaces.
        Profile("cuda", "cuda", ("CUDA_VISIBLE_DEVICES",), ("--nv",), 1536 * MIB),
        # An estimate, not measured by this project: as CUDA, and the larger workspaces of MIOpen and hipBLASLt.
        Profile(
            "rocm",
            "cuda",
            ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
            ("--rocm",),
            2048 * MIB,
        ),
    )
}


@dataclass(frozen=True)
class Device:
    """One device that a process can use: a GPU, or a slice of one that is partitioned.

    Args:
        index: its position among all devices of the machine, as the vendor's tool counts.
        memory_bytes: what can be allocated; the driver's own reserve is taken off, and of a partitioned AMD GPU it is
            the device's share.
        slice: this is a MIG instance, not a whole GPU.
    """

    index: int
    name: str
    memory_bytes: int
    uuid: str = ""
    slice: bool = False


@dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Args:
        driver, runtime: versions where they were found ("535.54.03", "12.2"), else empty.
        partitions: the compute partition modes of AMD devices ("SPX", "CPX"), which change how many devices there are.
        memory_partitions: their memory partition modes ("NPS1", "NPS4").
        notes: sentences for `doctor`: what looked odd.
    """

    profile: Profile
    devices: tuple[Device, ...]
    host_memory_bytes: int
    cores: int
    driver: str = ""
    runtime: str = ""
    partitions: tuple[str, ...] = ()
    memory_partitions: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def model_memory_bytes(self) -> int:
        """The most that one model can have without being split: the largest device, or the host's memory on CPU."""
        return max((device.memory_bytes for device in self.devices), default=self.host_memory_bytes)

    @property
    def spread_memory_bytes(self) -> int:
        """The same for a model that is spread over all devices; workers do so at isolation `none`."""
        return sum(device.memory_bytes for device in self.devices) or self.host_memory_bytes
