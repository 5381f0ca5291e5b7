"""The command line of a worker inside an allocation, in its image or bare. Pure: nothing is looked at or run.

Of the environment only what is named here goes in. The home is bound at its own path, since a worker reads its
settings and, once, its credentials there; the model cache is bound for reading alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from edif_hpc.hardware import interconnect
from edif_hpc.hardware.profiles import PROFILES

from .line import FOLDER
from .order import Order

SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURMD_NODENAME", "SLURM_CPUS_PER_TASK")
CACHES = {
    "XDG_CACHE_HOME": "xdg",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MIOPEN_USER_DB_PATH": "miopen-db",
    "MIOPEN_CUSTOM_CACHE_DIR": "miopen-cache",
}
"""A folder of its own for each allocation: MIOpen's sqlite files break when two nodes share them."""
INNER_TMP = "/tmp"  # noqa: S108 - inside the container, where it is the allocation's own folder
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def command(order: Order, scratch: Path, deadline: float, environment: Mapping[str, str]) -> list[str]:
    """The worker's whole command line.

    Args:
        scratch: the allocation's own folder on the node, which holds the folders of `CACHES`.
        environment: the batch step's, for what Slurm says about devices.
    """
    arguments = [
        "worker", "--home", str(order.home), "--id", order.name.worker, "--pool", order.pool.name,
        "--deadline", f"{deadline:.0f}", "--lineage", order.lineage, "--generation", str(order.generation),
        "--supervisor", str((Path(INNER_TMP) if order.pool.image else scratch) / FOLDER),
        "--handover", order.pool.handover,
    ]  # fmt: skip
    if order.config:
        arguments += ["--config", str(order.config)]
    if not order.pool.image:
        return [sys.executable, "-P", "-m", "edif_hpc.cli", *arguments]
    return [
        "apptainer", "exec", "--containall", "--cleanenv", "--no-eval", "--pwd", "/",
        *PROFILES[order.pool.accelerator].apptainer,
        *(part for bind in binds(order, scratch) for part in ("--bind", bind)),
        *(f"--env={name}={value}" for name, value in sorted(inner_environment(order, scratch, environment).items())),
        order.pool.image, "edif-hpc", *arguments,
    ]  # fmt: skip


def binds(order: Order, scratch: Path) -> list[str]:
    """What of the node's file system the container sees."""
    found = [f"{scratch}:{INNER_TMP}", str(order.home)]
    if not order.cache.is_relative_to(order.home):
        found.append(f"{order.cache}:{order.cache}:ro")
    if order.config and not order.config.is_relative_to(order.home):
        found.append(f"{order.config}:{order.config}:ro")
    return [*found, *order.pool.binds]


def covered(order: Order, scratch: Path) -> list[Path]:
    """Folders of the scratch that must exist: what else is bound below the container's /tmp is mounted onto them."""
    targets = [bind.removesuffix(":ro").rpartition(":")[2] for bind in binds(order, scratch)]
    below = (Path(target) for target in targets if target != INNER_TMP and Path(target).is_relative_to(INNER_TMP))
    return [scratch / target.relative_to(INNER_TMP) for target in below]


def inner_environment(order: Order, scratch: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment. No secret is ever in it."""
    inner = Path(INNER_TMP) if order.pool.image else scratch
    visible = PROFILES[order.pool.accelerator].visibility
    # Slurm may set several that hide devices, each counting what the one before left over: the first alone goes in.
    hiding = [name for name in visible if name in environment][:1]
    kept = {name: environment[name] for name in (*SLURM_VARIABLES, *hiding) if name in environment}
    caches = {name: str(inner / folder) for name, folder in CACHES.items()}
    own = {"TMPDIR": str(inner), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    return {**own, **kept, **caches, **proxies(order), **interconnect.variables(order.pool)}


def proxies(order: Order) -> dict[str, str]:
    """The pool's proxies in both spellings, and past them what is ours: neither Redis nor the store is reached so."""
    given = {name.lower(): value for name, value in order.pool.proxies.items()}
    ours = [part for part in (given.pop("no_proxy", ""), "localhost", "127.0.0.1", order.reached_at) if part]
    if not given:
        return {}
    found = {**given, "no_proxy": ",".join(ours)}
    return {**found, **{name.upper(): value for name, value in found.items()}}


def bare_environment(order: Order, scratch: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Without an image: what is named above, and what it takes to run a program at all."""
    passed = ("HOME", "USER", "LOGNAME", "PATH", "LD_LIBRARY_PATH")
    kept = {name: environment[name] for name in passed if name in environment}
    return {**kept, **inner_environment(order, scratch, environment)}
