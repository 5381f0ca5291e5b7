"""The device that models run on in tests: the CPU, or what `pytest --device` names, as `make test-gpu` does.

The tests marked `gpu` run in both ways. What differs on a device is decided here. Nothing of it was run on one yet.
"""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "EDIF_HPC_TEST_DEVICE"
CPU = "cpu"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""On a device two runs may take other kernels, and some of them add in no fixed order."""
PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""What a service must be told for it to find the devices that this process finds."""


def chosen() -> str:
    """As `worker.device` has it: cpu or cuda, which is HIP's name too."""
    return os.environ.get(VARIABLE, CPU)


def on_cpu() -> bool:
    return chosen() == CPU


def first() -> str:
    """As torch has it: the one device that a test's own model host loads onto."""
    return CPU if on_cpu() else f"{chosen()}:0"


def local() -> dict[str, str]:
    """What nnsight is told, so that a local run takes the same kernels."""
    return {} if on_cpu() else {"device": first()}


def environment() -> dict[str, str]:
    return {} if on_cpu() else {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def settings(toml: str) -> str:
    """Settings of a service, whose first section is `[models]`, with the device in them."""
    if on_cpu():
        return toml
    line = f'[worker]\ndevice = "{chosen()}"\n'
    return toml.replace("[worker]\n", line, 1) if "[worker]\n" in toml else f"{toml}\n{line}"


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two tensors hold the same numbers: exactly on the CPU."""
    import torch

    one, other = ours.detach().cpu(), theirs.detach().cpu()
    if on_cpu() or not one.is_floating_point():
        return torch.equal(one, other)
    return one.shape == other.shape and torch.allclose(one, other, **CLOSE)


def trouble(device: str) -> str:
    """Why tests cannot run on this device, in one sentence; "" when they can."""
    if device == CPU:
        return ""
    import torch

    if not torch.cuda.is_available():
        return (
            f"The tests were told to run on {device!r}, and torch {torch.__version__} finds no CUDA or ROCm device "
            "here: run them on a machine with a GPU, in an environment with a build of torch for it "
            "(make install TORCH=...); `edif-hpc doctor` says what the driver shows."
        )
    return ""
