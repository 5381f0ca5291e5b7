"""The agent's side of one model host: start it, run requests on it, notice its end. No torch here.

The host is a child process with a clean environment and no credentials. When it dies, `died` tells; starting another
one is the agent's decision.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edif_hpc.core.errors import HostDied, HostError
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import ModelKey
from edif_hpc.worker.channel import AsyncChannel, Channel, ChannelError, Message, close_all
from edif_hpc.worker.companions import Companion
from edif_hpc.worker.contract import HostSpec, Outcome, RunSpec
from edif_hpc.worker.executors import Executors, gone
from edif_hpc.worker.inline_runs import InlineRuns
from edif_hpc.worker.messages import host_spec_message
from edif_hpc.worker.process import IGNORED, clean_environment, held, kill
from edif_hpc.worker.runs import Run

LOG = "host.log"
LAST_WORDS_BYTES = 2000
STOP_SECONDS = 30.0
"""How long `close` waits for killed processes to be gone; only one stuck in the kernel takes this long."""


class ModelHost:
    """One model, ready for requests. Made by `start`, ended by `close`.

    Attributes:
        level: the isolation that was really reached.
        memory_bytes: what the host costs the machine, weights included, without executors.
        pid: the host's.
        environment: `python_version` and `packages`, as `nnsight.compare()` wants them.
        died: resolves with a sentence when the host can serve no more, for whatever reason but `close`.
    """

    level: Isolation
    memory_bytes: int
    environment: dict[str, Any]

    def __init__(self, spec: HostSpec, on_progress: Callable[[str], None]) -> None:
        self._spec = spec
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self.died: asyncio.Future[str] = self._loop.create_future()
        self._runs: dict[str, Run] = {}
        self._backend: InlineRuns | Executors | None = None
        self._zygote = 0
        self._zygote_pidfd = -1
        self._ranks: dict[int, int] = {}
        """Process id -> pidfd of each rank but the host itself."""
        self._lent: asyncio.Future[tuple[int, ...]] = self._loop.create_future()
        """What another host's runs may map of this one's model."""
        self._lending = False
        self._silent = False
        self._closing = False
        self._process, channel = _spawn(spec)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)
        self._channel = AsyncChannel(channel, self._hear, self._channel_ended)
        self._channel.send(host_spec_message(spec))

    @classmethod
    async def start(cls, spec: HostSpec, on_progress: Callable[[str], None]) -> ModelHost:
        """Start a host and wait until it can serve. Cancelling stops it.

        Raises:
            HostError: one sentence saying why it cannot.
        """
        ModelKey.parse(spec.model_key)
        if not spec.isolation.covers(spec.required):
            raise HostError(
                f"Isolation {spec.required.value} is required, but this host was asked to run at "
                f"{spec.isolation.value}: ask for {spec.required.value}."
            )
        if spec.ranks > 1 and spec.isolation is not Isolation.NONE:
            raise HostError(
                f"models.tensor_parallel is {spec.ranks}, and models on several ranks are served at isolation none "
                f"only, so far, not at {spec.isolation.value}: set worker.isolation to none, or models.tensor_parallel "
                "to 1."
            )
        host = cls(spec, on_progress)
        try:
            await host._ready
        except BaseException:
            await host.close()
            raise
        return host

    def pids(self) -> dict[str, int]:
        """Every process of this host by name, for `ps`."""
        zygote = {"zygote": self._zygote} if self._zygote else {}
        executors = self._backend.pids() if self._backend is not None else {}
        ranks = {f"rank-{number}": pid for number, pid in enumerate(self._ranks, 1)}
        return {"host": self.pid, **zygote, **ranks, **executors}

    @property
    def alive(self) -> bool:
        return not self.died.done() and not self._closing

    async def run(
        self,
        spec: RunSpec,
        payload: bytes | int,
        on_log: Callable[[str], None],
        on_start: Callable[[], None],
        others: Sequence[ModelHost] = (),
    ) -> Outcome:
        """Run one request; several may be under way. Cancelling the awaiting task cancels the run.

        Args:
            spec: what to run; its `run_id` must not be under way already.
            payload: the bytes as the client sent them, or a descriptor of them, which stays the caller's.
            on_log: called with each line that the block prints.
            on_start: called once when its code begins.
            others: hosts of further models that it needs at hand. They must not be closed before it has ended.

        Raises:
            HostError: this host, or one of the others, is dead or closed.
        """
        companions = [await other.lend() for other in others]
        if not self.alive or self._backend is None:
            raise self._ended()
        run = Run(spec, payload, self.level, on_log, on_start, companions)
        self._runs[spec.run_id] = run
        try:
            return await self._backend.run(run)
        finally:
            if not run.outcome.done() or run.outcome.cancelled():
                self.cancel(spec.run_id)
            del self._runs[spec.run_id]
            run.close()
            for host in (self, *others):
                host._verify()

    async def lend(self) -> Companion:
        """What another host's run maps of this model. The descriptors stay this host's.

        Raises:
            HostError: this host is dead or closed, or its model cannot be lent.
        """
        if not self.alive or self._backend is None:
            raise self._ended()
        if self.level is Isolation.NONE:
            if self._spec.device != "cpu" or self._spec.ranks > 1:
                raise HostError(
                    "At isolation none several models come together in one script on CPUs only: have the pool run at "
                    "process or locked."
                )
            if not self._lending:
                self._lending = True
                self._channel.send({"type": "lend"})
        waited: set[asyncio.Future[Any]] = {self._lent, self.died}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._lent.done() or self._lent.cancelled():
            raise self._ended()
        return Companion(self._spec, self._lent.result())

    def _ended(self) -> HostError:
        why = self.died.result() if self.died.done() and not self.died.cancelled() else "It was closed."
        return HostError(f"This model host has ended, start another one. {why}")

    def _verify(self) -> None:
        if self._spec.device != "cpu" and self.level is not Isolation.NONE:
            self._channel.send({"type": "verify"})  # a device's weights cannot be sealed; see device_weights

    def cancel(self, run_id: str) -> None:
        """End a run at once, as `cancelled`; nothing happens when it is not under way."""
        run = self._runs.get(run_id)
        if run is not None and self._backend is not None:
            self._backend.cancel(run)

    async def close(self) -> None:
        """Kill every process of this host and wait until they are gone."""
        if self._closing:
            return
        self._closing = True
        others = [fd for fd in (self._zygote_pidfd, *self._ranks.values()) if fd >= 0]
        pidfds = [self._pidfd, *others]
        for fd in pidfds:
            kill(fd)
        if self._backend is not None:
            await asyncio.wait_for(self._backend.close(), STOP_SECONDS)
        self._channel.close()
        await asyncio.wait_for(self._exited, STOP_SECONDS)
        for fd in others:
            await asyncio.wait_for(gone(fd), STOP_SECONDS)
        close_all(pidfds)
        self._take_back()
        self.died.cancel()

    def _take_back(self) -> None:
        """Close what is lent: whoever maps it keeps it."""
        if self._lent.done() and not self._lent.cancelled() and not self._lent.exception():
            close_all(self._lent.result())
        self._lent = self._loop.create_future()
        self._lent.cancel()

    # -- what the host says -------------------------------------------------------------------------------------------

    def _hear(self, message: Message, fds: list[int]) -> None:
        kind = message.get("type")
        if kind == "progress":
            self._on_progress(str(message["text"]))
        elif kind == "failed":
            self._fail_start((HostDied if message["died"] else HostError)(str(message["text"])))
            self._set_died(str(message["text"]))
        elif kind == "ready":
            self._become_ready(message, fds)
        elif kind in ("lent", "unlendable"):
            self._hear_of_lending(message, fds)
        elif isinstance(self._backend, InlineRuns):
            try:
                self._backend.hear(message)
            except ChannelError as error:
                self._on_progress(f"the model host is killed: {error}")
                self._kill_host()

    def _hear_of_lending(self, message: Message, fds: list[int]) -> None:
        if self._lent.done():  # it has ended meanwhile
            close_all(fds)
        elif message["type"] == "lent":
            self._lent.set_result(tuple(fds))
        else:
            self._lent.set_exception(HostError(str(message["text"])))

    def _become_ready(self, message: Message, fds: list[int]) -> None:
        self.level = Isolation(message["level"])
        self.memory_bytes = int(message["memory_bytes"])
        self.environment = message["environment"]
        if self.level is Isolation.NONE:
            self._backend = InlineRuns(self._channel, self._kill_host, self._spec.ranks)
            with contextlib.suppress(ProcessLookupError):  # the host ends with such a rank
                self._ranks = {int(pid): os.pidfd_open(int(pid)) for pid in message["ranks"]}
        else:
            zygote_fd, self._zygote_pidfd, *lent = fds
            self._lent.set_result(tuple(lent))
            self._zygote = int(message["zygote"])
            zygote, spec = Channel.from_fd(zygote_fd), self._spec
            self._backend = Executors(zygote, spec.spares, self._broken, spec.concurrency)
        if not self._ready.done():
            self._ready.set_result(None)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _kill_host(self) -> None:
        kill(self._pidfd)

    def _broken(self, sentence: str) -> None:
        """Executors can no longer be had: take the rest down too, so that there is one failure and not two."""
        self._set_died(sentence)
        self._kill_host()

    def _channel_ended(self, error: Exception | None) -> None:
        self._silent = True
        if error is not None:
            self._kill_host()
        self._conclude()

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        code = self._process.wait()
        self._exited.set_result(-code if code < 0 else code << 8)
        self._conclude()

    def _conclude(self) -> None:
        """Once the host has ended and everything it had said was heard."""
        if not self._exited.done() or not self._silent:
            return
        status = self._exited.result()
        how = f"signal {status}" if status < 256 else f"exit code {status >> 8}"
        self._fail_start(HostDied(f"The model host ended while it loaded ({how}); the worker's log says more."))
        self._set_died(f"The model host ended ({how}).")
        if self._backend is not None:
            self._backend.ended(status)

    def _fail_start(self, error: HostError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)

    def _set_died(self, sentence: str) -> None:
        if not self.died.done() and not self._closing:
            self.died.set_result(sentence)
            self._take_back()


def _spawn(spec: HostSpec) -> tuple[subprocess.Popen[bytes], Channel]:
    ours, theirs = Channel.pair()
    name = ModelKey.parse(spec.model_key).repo_id
    command = [sys.executable, "-P", "-m", "edif_hpc.worker.host", str(theirs.fileno()), str(os.getpid()), name]
    with open(_log_path(spec), "ab") as log, held(IGNORED):
        process = subprocess.Popen(
            command,
            env=clean_environment(spec, os.environ),
            cwd=spec.scratch,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    theirs.close()
    return process, ours


def _log_path(spec: HostSpec) -> str:
    return str(spec.scratch / LOG)


def last_words(scratch: Path) -> str:
    """The end of what the hosts with this scratch folder wrote."""
    try:
        with open(scratch / LOG, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
            return log.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
