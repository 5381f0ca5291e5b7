"""Isolation of one process from everything else, with ctypes alone: `probe()` what there is, then `enter(policy)`."""

from edif_hpc.worker.sandbox.enter import enter
from edif_hpc.worker.sandbox.policy import Policy, Reach, SandboxError
from edif_hpc.worker.sandbox.probe import probe

__all__ = ["Policy", "Reach", "SandboxError", "enter", "probe"]
