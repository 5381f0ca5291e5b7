"""The client's and the agent's half of a run, for tests: a block becomes a payload, a payload becomes an outcome."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

from edif_hpc.core import planes
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import ResultFormat
from edif_hpc.worker.contract import HostSpec, Limits, Outcome, RunSpec, Verdict
from edif_hpc.worker.host_client import ModelHost

PROMPT = "The Eiffel Tower is located in the city of"
COUNT = iter(range(1_000_000))


class Caught(Backend):
    """Takes a block's payload instead of sending it: `with model.trace(…, backend=caught)`."""

    def __init__(self, compress: bool = True, planes: bool = False) -> None:
        self.compress = compress
        self.format = ResultFormat.of("planes" if planes else "", compress)
        self.blob = b""

    def __call__(self, tracer: Any = None) -> None:
        self.blob = RequestModel.serialize(tracer, compress=self.compress)


class Service:
    """One model host and the event loop it lives on; started again when it has died."""

    def __init__(self, loop: asyncio.AbstractEventLoop, spec: HostSpec, host: ModelHost | None = None) -> None:
        self.loop = loop
        self.spec = spec
        self.host = host or self._start()

    def _start(self) -> ModelHost:
        return self.loop.run_until_complete(ModelHost.start(self.spec, lambda text: None))

    @property
    def level(self) -> Isolation:
        return self.host.level

    def revive(self) -> None:
        """Start another host when this one has died, as the agent would."""
        self.loop.run_until_complete(asyncio.sleep(0))
        if self.level is Isolation.NONE:
            self.loop.run_until_complete(asyncio.sleep(0.2))
        if not self.host.alive:
            self.loop.run_until_complete(self.host.close())
            self.host = self._start()

    def request(self, caught: Caught, env: dict[str, Any] | None = None, **limits: Any) -> RunSpec:
        run_id = f"request-{next(COUNT)}:1"
        return RunSpec(run_id, caught.compress, env or {}, replace(Limits(), **limits), caught.format)

    def outcome(
        self,
        caught: Caught,
        env: dict[str, Any] | None = None,
        on_log: Callable[[str], None] = lambda line: None,
        **limits: Any,
    ) -> Outcome:
        spec = self.request(caught, env, **limits)
        outcome = self.loop.run_until_complete(self.host.run(spec, caught.blob, on_log, lambda: None))
        assert outcome.isolation is self.spec.isolation
        return outcome

    def saves(self, caught: Caught, env: dict[str, Any] | None = None, **limits: Any) -> dict[str, Any]:
        """Run a block that must succeed and load what it saved, as the client would."""
        outcome = self.outcome(caught, env, **limits)
        assert outcome.verdict is Verdict.COMPLETED, outcome.description
        assert outcome.description == ""
        return loaded(outcome, caught.format)

    def close(self) -> None:
        self.loop.run_until_complete(self.host.close())


def content(outcome: Outcome) -> bytes:
    """The result's bytes; gives the file back."""
    assert outcome.result is not None
    with io.FileIO(outcome.result.fd, closefd=False) as file:
        data = file.readall()
    assert len(data) == outcome.result.size
    outcome.result.close()
    return data


def loaded(outcome: Outcome, form: ResultFormat) -> dict[str, Any]:
    data = content(outcome)
    if form is ResultFormat.ZSTD:
        data = zstandard.ZstdDecompressor().decompress(data)
    elif form is ResultFormat.PLANES:
        data = planes.decode(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def scratch() -> Path:
    """A directory for a host. Not under pytest's own, which other users may not enter."""
    return Path(tempfile.mkdtemp(prefix="edif-test-host-"))


def exists(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
