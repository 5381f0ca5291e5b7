"""What this machine has, asked of the vendors' own tools: no torch, so a login node and the agent can ask too.

A tool that is missing, hangs or fails is a note, not an error: a machine without a working GPU is a CPU machine.
Contradictory visibility variables are an error, because they would make GPUs vanish silently.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from edif_hpc.hardware import host, partitions
from edif_hpc.hardware.partitions import Modes
from edif_hpc.hardware.profiles import PROFILES, Machine
from edif_hpc.hardware.smi import Report, parse_amd, parse_amd_partitions, parse_nvidia, parse_rocm
from edif_hpc.hardware.visibility import visible

TOOL_SECONDS = 30.0
"""nvidia-smi without persistence mode wakes every GPU first, which takes seconds each."""

TOOLS: tuple[tuple[str, tuple[str, ...], Callable[[str], Report]], ...] = (
    ("cuda", ("nvidia-smi", "-q", "-x"), parse_nvidia),
    (
        "rocm",
        ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showuniqueid", "--showdriverversion", "--json"),
        parse_rocm,
    ),
    ("rocm", ("amd-smi", "static", "--asic", "--vram", "--driver", "--json"), parse_amd),
)
"""In this order; the first that lists a device decides."""
PARTITION_TOOL = ("amd-smi", "partition", "--json")


def detect(environment: Mapping[str, str] | None = None, root: Path = Path("/")) -> Machine:
    """Look at the machine.

    Args:
        environment: where PATH and the visibility variables are read; by default this process's own.
        root: where /proc and /sys are found.

    Raises:
        SettingsError: the visibility variables contradict each other.
    """
    env = os.environ if environment is None else environment
    notes: list[str] = []
    name, report = "cpu", Report()
    for accelerator, command, parse in TOOLS:
        found = parse(_ask(command, env, notes))
        if found.devices:
            name, report = accelerator, found
            break
    profile = PROFILES[name]
    modes = _modes(root, env) if name == "rocm" else Modes()
    devices = partitions.shared_out(visible(profile, report.devices, env), modes)
    notes += partitions.notes(devices, modes)
    if report.devices and not devices:
        hidden = " and ".join(f"{key}={env[key]}" for key in profile.visibility if key in env)
        notes.append(f"{hidden} hides all {len(report.devices)} devices of this machine, so it counts as a CPU.")
        profile = PROFILES["cpu"]
    if devices and devices[0].slice:
        devices = devices[:1]  # the others are no devices to this process
    return Machine(
        profile=profile,
        devices=devices,
        host_memory_bytes=host.memory_bytes(root),
        cores=host.cores(),
        driver=report.driver,
        runtime=report.runtime or (_rocm_version(env, root) if name == "rocm" else ""),
        partitions=modes.compute,
        memory_partitions=modes.memory,
        notes=tuple(notes),
    )


def _ask(command: tuple[str, ...], env: Mapping[str, str], notes: list[str]) -> str:
    """What a tool prints; empty when there is none or it failed, which is noted."""
    program = shutil.which(command[0], path=env.get("PATH", ""))
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TOOL_SECONDS,
            check=False,
            text=True,
            errors="replace",
            env=dict(env),
        )
    except subprocess.TimeoutExpired:
        notes.append(f"{command[0]} did not answer within {TOOL_SECONDS:.0f} s; its driver may hang.")
        return ""
    except OSError as error:
        notes.append(f"{command[0]} could not be run ({error.strerror}).")
        return ""
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        notes.append(f"{command[0]} failed: {said[:200]}")
        return ""
    return done.stdout


def _rocm_version(env: Mapping[str, str], root: Path) -> str:
    """ROCm's release, which its packages write below its prefix."""
    prefix = Path(env.get("ROCM_PATH") or root / "opt/rocm")
    try:
        return (prefix / ".info" / "version").read_text().strip()
    except OSError:
        return ""


def _modes(root: Path, env: Mapping[str, str]) -> Modes:
    """The modes of all AMD GPUs of the machine: from the driver's own files, else from amd-smi.

    That it has no such command, as older ones, or may not tell is no news for `doctor`.
    """
    compute, memory = (_said_by_driver(root, f"current_{kind}_partition") for kind in ("compute", "memory"))
    return Modes(compute, memory) if compute else parse_amd_partitions(_ask(PARTITION_TOOL, env, []))


def _said_by_driver(root: Path, name: str) -> tuple[str, ...]:
    said = set()
    for path in (root / "sys/class/drm").glob(f"card*/device/{name}"):
        try:
            said.add(path.read_text().strip())
        except OSError:  # the driver answers "not permitted" during a reset
            continue
    return tuple(sorted(said - {"", "UNKNOWN"}))
