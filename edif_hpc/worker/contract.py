"""What the agent asks of a model host, and what it gets back. No torch: the agent imports this.

Everything that comes from an executor is a stranger's word: the fields here are filled only from JSON that was checked
and bounded, and a result stays an open file of opaque bytes that nobody in this process unpickles.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import Kind, ResultFormat

MIB = 1024 * 1024


@dataclass(frozen=True)
class HostSpec:
    """One model to hold.

    Args:
        model_key: the client's key, `nnsight.modeling.transformers.TransformersModel:{json}`; its class was checked
            against the allow-list at the gateway and is checked again by the host.
        cache: the Hugging Face hub cache directory (`.../hub`); workers are offline.
        scratch: a private directory (0700) for sockets and temporary files of this host.
        isolation: the level to run requests at. The host reports the level that it reached.
        required: the weakest level that is acceptable; a host that cannot reach it refuses to start.
        dtype: a torch dtype name or "auto" for the checkpoint's own.
        device: "cpu" or a torch device such as "cuda:0"; the devices of several ranks as "cuda:0+1"; of a model that is
            spread, the one where inputs arrive.
        spread: for a model that is too large for one device, all of its devices and the bytes of weights that each may
            hold; else empty. Only at level `none`.
        threads: torch threads a request may use, in each rank.
        spares: executors forked ahead of need.
        concurrency: requests that run at a time, others wait in line; 0 for no limit. At level `none` it is always one.
        adapters: PEFT adapter ids that an admin allowed, with the directory each lives in.
        nice: niceness of executors, so that user code does not starve the agent.
        ranks: processes that share the model, each with its part of the weights; above one only at level `none`.
        rank_seconds: how long one rank waits for another before it counts as gone.
    """

    model_key: str
    cache: Path
    scratch: Path
    isolation: Isolation = Isolation.LOCKED
    required: Isolation = Isolation.NONE
    dtype: str = "auto"
    device: str = "cpu"
    spread: dict[str, int] = field(default_factory=dict)
    threads: int = 1
    spares: int = 2
    concurrency: int = 0
    adapters: dict[str, str] = field(default_factory=dict)
    nice: int = 0
    ranks: int = 1
    rank_seconds: float = 60.0

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device that holds a part of the model."""
        return tuple(self.spread) or (self.device,)


@dataclass(frozen=True)
class Limits:
    """What one request may use, on each rank of its model. Sizes in bytes, times in seconds."""

    run_seconds: float = 600.0
    memory_bytes: int = 8 * 1024 * MIB
    result_bytes: int = 4 * 1024 * MIB
    payload_bytes: int = 256 * MIB
    """The decompressed payload; a bomb ends here."""
    log_lines: int = 1000
    log_line_bytes: int = 4096


@dataclass(frozen=True)
class RunSpec:
    """One attempt at one request."""

    run_id: str
    """`request id:attempt`, for logs; never a path."""
    compress: bool
    """Whether the payload is one zstd frame."""
    env: dict[str, Any]
    limits: Limits = Limits()
    format: ResultFormat = ResultFormat.ZSTD
    kind: Kind = Kind.TRACE
    form: str = ""
    """Of a script: the suffix of the file that its saved values are written as."""


class Verdict(StrEnum):
    """How a run ended, in the terms Delivery needs.

    `completed`: there is a result. `failed`: the user's own (exception, time or memory limit, segfault, abort) or a
    refusal: ERROR at once. `lost`: an unexplained end; another attempt may follow. `cancelled`: the agent killed it.
    """

    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"


@dataclass
class ResultFile:
    """The bytes the client will download, in an anonymous file that this process owns and must close."""

    fd: int
    size: int

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass
class Outcome:
    """The end of one run.

    Args:
        description: empty on success; the user's traceback or one sentence otherwise.
        result: only when completed.
        meta: `runtime` (s), `max_memory_usage` (bytes), `max_mem_by_gpu`, `max_mem_pct_by_gpu` (string keys); on
            out-of-memory also `alloc_shortfall_by_gpu`. `own_file` where a script wrote its result's file itself.
        isolation: the level this run really had.
    """

    verdict: Verdict
    description: str = ""
    result: ResultFile | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    isolation: Isolation = Isolation.NONE
