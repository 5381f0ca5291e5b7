"""A pool: one kind of allocation, as an admin describes it in `[[pool]]`.

Everything that can be judged without looking at a cluster is refused here, by the key's name: a wrong option would
otherwise show hours later, as an allocation that never starts.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .isolation import Isolation

MINUTE, HOUR, DAY = 60, 3600, 86400
UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
LEAST_SECONDS = 2 * MINUTE
"""A walltime below this leaves no time to load a model and hand over."""
SLURM_ONLY = (
    "image", "partition", "account", "qos", "reservation", "constraint", "gres", "gpus", "cpus", "memory", "nodes",
    "exclusive", "options", "setup", "binds", "handover", "interconnect", "adapters", "interfaces", "time", "proxies",
)  # fmt: skip
OWNED_OPTIONS = (
    "job-name", "output", "error", "open-mode", "time", "signal", "dependency", "requeue", "no-requeue", "export",
    "array", "nodes", "ntasks", "ntasks-per-node", "partition", "account", "qos", "reservation", "constraint", "gres",
    "gpus", "cpus-per-task", "mem", "exclusive", "wait", "test-only", "parsable", "wrap", "chdir", "get-user-env",
    "export-file",
)  # fmt: skip
"""What a pool's extra options may not set: the launcher does, from keys of their own or for its own needs."""
LISTED = r"(\^?=?{name}(,{name})*)?"
"""How NCCL writes a list of names: `=` takes them exactly and not as prefixes, `^` excludes them."""
ADAPTER, INTERFACE = r"[A-Za-z0-9_.-]+(:\d+)?", r"[A-Za-z0-9_.-]+"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
COUNTED_GRES = re.compile(r"gpu(:[A-Za-z_][\w.-]*)?(:(?P<count>\d+))?(\([^)]*\))?")
"""A generic resource whose number is known to be one of GPUs: `gpu`, `gpu:2`, `gpu:a100`, `gpu:a100:2`."""
TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    r"|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)|(?P<mm>\d+):(?P<ss>\d+)|(?P<minutes>\d+))"
)


class Pool(BaseModel):
    """One `[[pool]]`. Slurm's own words are used for what Slurm is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern="^[a-z][a-z0-9-]{0,30}$", description="Its name: small letters, digits, hyphens.")
    launcher: Literal["local", "slurm"] = Field(default="slurm", description="Processes here, or allocations.")
    accelerator: Literal["cuda", "rocm", "cpu"] = Field(default="cpu", description="What its workers compute on.")
    image: str = Field(default="", description="Apptainer image (SIF); empty: this installation, if shared.")
    partition: str = Field(default="", description="Slurm partition; empty: the site's default, as for the four below.")
    account: str = Field(default="", description="Slurm account.")
    qos: str = Field(default="", description="Slurm QOS.")
    reservation: str = Field(default="", description="Slurm reservation.")
    constraint: str = Field(default="", description="Features a node must have.")
    gres: str = Field(default="", description="Generic resources, as `gpu:a100:1`; not together with gpus.")
    gpus: int = Field(default=0, ge=0, description="GPUs of an allocation, where the site wants --gpus.")
    cpus: int = Field(default=0, ge=0, description="Cores of an allocation; 0: the site's default.")
    memory: str = Field(default="", pattern=r"^(\d+[KMGT]?)?$", description="Memory of an allocation, as `64G`.")
    time: str = Field(default="24:00:00", description="Walltime, in any form that sbatch takes.")
    nodes: int = Field(default=1, description="Nodes of an allocation; 1, since each holds one worker on one node.")
    exclusive: bool = Field(default=False, description="Whether an allocation takes whole nodes.")
    options: list[str] = Field(default=[], description="Further sbatch options, as `--nice=100`.")
    setup: list[str] = Field(
        default=[], description="Shell lines that the batch script runs first, as `module load apptainer`."
    )
    proxies: dict[str, str] = Field(default={}, description="Proxies for the workers, as { https_proxy = URL }.")
    binds: list[str] = Field(default=[], description="Further paths for the container, as `/scratch` or `/a:/b:ro`.")
    interconnect: Literal["none", "ethernet", "infiniband", "slingshot"] = Field(
        default="none", description="The network that NCCL or RCCL is told about; none: they look for themselves."
    )
    adapters: str = Field(
        default="",
        pattern=f"^{LISTED.format(name=ADAPTER)}$",
        description="InfiniBand adapters, as `=mlx5_0:1,mlx5_3:1` (NCCL_IB_HCA); empty: all.",
    )
    interfaces: str = Field(
        default="",
        pattern=f"^{LISTED.format(name=INTERFACE)}$",
        description="Network interfaces, as `ib0` or `^docker` (NCCL_SOCKET_IFNAME); empty: the fabric's own.",
    )
    models: list[str] = Field(default=["*"], min_length=1, description="Models it serves: repo ids or patterns.")
    min_workers: int = Field(default=0, ge=0, description="Workers that are kept also when nobody asks.")
    max_workers: int = Field(default=1, ge=0, description="Most workers at a time.")
    idle_seconds: float = Field(default=600.0, gt=0, description="A worker without requests ends after this time.")
    handover: Literal["overlap", "requeue"] = Field(
        default="overlap",
        description="Whether a successor starts beside its predecessor, or after it where there is room for one alone.",
    )
    isolation: Isolation | None = Field(default=None, description="The level its workers must reach; empty: any.")

    @property
    def walltime_seconds(self) -> int:
        return seconds_of(self.time)

    @property
    def memory_bytes(self) -> int | None:
        """What `memory` says; Slurm's bare numbers are MiB. None where the site's default holds."""
        match = re.fullmatch(r"(\d+)([KMGT]?)", self.memory)
        return int(match[1]) * UNITS[match[2] or "M"] if match else None

    @property
    def gpu_count(self) -> int | None:
        """GPUs of an allocation, as far as they can be told from what is asked for; None where they cannot."""
        match = COUNTED_GRES.fullmatch(self.gres)
        if match:
            return int(match["count"] or 1)
        return self.gpus or None

    def serves(self, repo_id: str) -> bool:
        return any(fnmatchcase(repo_id, pattern) for pattern in self.models)

    @field_validator("time")
    @classmethod
    def readable_time(cls, text: str) -> str:
        if seconds_of(text) < LEAST_SECONDS:
            raise ValueError(f"time is {text!r}; an allocation needs {LEAST_SECONDS // MINUTE} minutes at least")
        return text

    @field_validator("partition", "account", "qos", "reservation", "constraint", "gres", "image")
    @classmethod
    def one_line(cls, text: str) -> str:
        if text != text.strip() or any(not character.isprintable() for character in text):
            raise ValueError("must be one line without spaces around it")
        return text

    @field_validator("partition", "account", "qos", "reservation", "gres")
    @classmethod
    def one_word(cls, text: str) -> str:
        if " " in text:
            raise ValueError(f"{text!r} has a space in it; Slurm takes one name, or several with commas between them")
        return text

    @field_validator("nodes")
    @classmethod
    def one_node(cls, nodes: int) -> int:
        if nodes != 1:
            raise ValueError(
                f"nodes is {nodes}, but an allocation holds one worker, which serves from one node, so others would "
                "stay idle; leave nodes at 1, and raise max_workers for more allocations"
            )
        return nodes

    @field_validator("options")
    @classmethod
    def options_of_their_own(cls, options: list[str]) -> list[str]:
        for option in options:
            match = re.fullmatch(r"--([a-z][a-z0-9-]*)(=[^\s'\"\\`$]*)?", option)
            if not match:
                raise ValueError(f"options: {option!r} is not of the form --name or --name=value")
            if any(owned.startswith(match[1]) for owned in OWNED_OPTIONS):  # sbatch takes abbreviations
                raise ValueError(f"options: --{match[1]} is set by edif-hpc; use the pool's own keys")
        return options

    @field_validator("image")
    @classmethod
    def whole_path(cls, path: str) -> str:
        if path and not path.startswith("/"):
            raise ValueError(f"{path!r} must be a whole path, from / on, as compute nodes see it")
        return path

    @field_validator("binds")
    @classmethod
    def whole_paths(cls, binds: list[str]) -> list[str]:
        for bind in binds:
            if not bind.startswith("/"):
                raise ValueError(f"{bind!r} must begin with a whole path, as /scratch or /a:/b:ro")
        return binds

    @field_validator("proxies")
    @classmethod
    def proxies_and_nothing_else(cls, proxies: dict[str, str]) -> dict[str, str]:
        for name, value in proxies.items():
            if name.lower() not in PROXIES:
                raise ValueError(f"{name!r} is no proxy variable; there are: {', '.join(PROXIES)}")
            if "@" in value:
                raise ValueError(
                    f"{name} holds a user or a password, which everybody on a node could read; leave it out"
                )
        return proxies

    @field_validator("setup", "binds")
    @classmethod
    def single_lines(cls, lines: list[str]) -> list[str]:
        for line in lines:
            if any(character in line for character in "\n\r\0"):
                raise ValueError(f"{line!r} is more than one line")
        return lines

    @model_validator(mode="after")
    def nothing_contradicts(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers ({self.min_workers}) is above max_workers ({self.max_workers})")
        if self.launcher == "local":
            given = [key for key in SLURM_ONLY if key in self.model_fields_set]
            if given:
                raise ValueError(f"{given[0]} is only for pools whose launcher is slurm")
        if self.gres and self.gpus:
            raise ValueError("gres and gpus say the same twice; keep the one that your site documents")
        if self.memory and any(option.startswith("--mem-per-") for option in self.options):
            raise ValueError("memory and --mem-per-... in options contradict each other; Slurm takes one of them")
        by_option = any(option.startswith("--gpus-per-") for option in self.options)
        if self.gpu_count == 0:
            raise ValueError(f"gres is {self.gres}, which asks for no GPU; leave it out, or ask for one at least")
        if self.accelerator == "cpu" and (self.gpus or "gpu" in self.gres or by_option):
            raise ValueError("accelerator is cpu, but gres, gpus or options ask for GPUs; set it to cuda or rocm")
        # What a site's GPUs are called as generic resources is its own choice.
        wants_gpu = self.gpus or self.gres or by_option or self.exclusive
        if self.launcher == "slurm" and self.accelerator != "cpu" and not wants_gpu:
            raise ValueError(f"accelerator is {self.accelerator}, but no GPU is asked for; set gres, gpus or exclusive")
        self._check_interconnect()
        return self

    def _check_interconnect(self) -> None:
        if self.interconnect != "none" and self.accelerator == "cpu":
            raise ValueError(f"interconnect is {self.interconnect}, but accelerator is cpu, and only GPUs talk over it")
        if self.adapters and self.interconnect != "infiniband":
            raise ValueError(f"adapters are InfiniBand's, but interconnect is {self.interconnect}")
        if self.interfaces and self.interconnect == "none":
            raise ValueError("interfaces are given, but interconnect is none; name the network they belong to")


def seconds_of(text: str) -> int:
    """A time as Slurm writes it (`90`, `30:00`, `24:00:00`, `1-12`, `1-12:30:00`), in seconds.

    Raises:
        ValueError: it is none.
    """
    match = TIME.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no time that Slurm knows, as 24:00:00 or 1-12:00:00")
    part = {name: int(value) for name, value in match.groupdict(default="0").items()}
    return (
        part["days"] * DAY
        + (part["dh"] + part["h"]) * HOUR
        + (part["dm"] + part["m"] + part["mm"] + part["minutes"]) * MINUTE
        + part["ds"] + part["s"] + part["ss"]
    )  # fmt: skip
