"""One run as the agent sees it, whoever executes it: checked messages in, one outcome out. No torch here."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Sequence
from typing import Any

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import Kind
from edif_hpc.worker.channel import ChannelError, Message, close_all
from edif_hpc.worker.companions import Companion
from edif_hpc.worker.contract import Outcome, ResultFile, RunSpec, Verdict
from edif_hpc.worker.ends import time_limit_sentence
from edif_hpc.worker.messages import parse_finished, parse_log, run_message

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Run:
    """A request on its way. Owns its payload and result files until the outcome takes the latter.

    Args:
        spec: what to run.
        payload: the bytes as the client sent them, or a descriptor of them, which stays the caller's.
        level: the isolation that this run has.
        on_log: called with each line the block prints, in order.
        on_start: called once when the executor begins with it.
        companions: further models that it needs; theirs stay the hosts' that lent them.
    """

    def __init__(
        self,
        spec: RunSpec,
        payload: bytes | int,
        level: Isolation,
        on_log: Callable[[str], None],
        on_start: Callable[[], None],
        companions: Sequence[Companion] = (),
    ) -> None:
        self.spec = spec
        self.companions = companions
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.started = False
        self._level = level
        self._on_log = on_log
        self._on_start = on_start
        self._log_lines = 0
        self._timer: asyncio.TimerHandle | None = None
        self._payload = _payload_file(payload)
        self._result = _result_file(spec.limits.result_bytes)
        # What a script writes itself: it may be opened by its path, truncated and grown, so it is a file of its own.
        self._output = os.memfd_create("edif-output", os.MFD_CLOEXEC) if spec.kind is Kind.SCRIPT else -1

    @property
    def message(self) -> Message:
        return run_message(self.spec)

    @property
    def fds(self) -> list[int]:
        return [self._payload, self._result, *([self._output] if self._output >= 0 else [])]

    def watch(self, on_time: Callable[[], None]) -> None:
        """Start the clock of the time limit."""
        self._timer = asyncio.get_running_loop().call_later(self.spec.limits.run_seconds, on_time)

    def hear(self, message: Message) -> None:
        """Take what the executor says about this run; ChannelError when it is not allowed to say that."""
        kind = message.get("type")
        if kind == "log":
            self._log_lines += 1
            if self._log_lines <= self.spec.limits.log_lines + 1:  # one more says that lines were dropped
                self._on_log(parse_log(message, self.spec.limits))
        elif kind == "started" and not self.started:
            self.started = True
            self._on_start()
        elif kind == "finished":
            self._finish(message)
        else:
            raise ChannelError("an executor sent a message that it may not send")

    def end(self, verdict: Verdict, description: str, meta: dict[str, Any] | None = None) -> None:
        """Settle the outcome, once; later calls change nothing."""
        if not self.outcome.done():
            self._settle(Outcome(verdict, description, None, meta or {}, self._level))

    def time_is_up(self) -> None:
        self.end(Verdict.FAILED, time_limit_sentence(self.spec.limits.run_seconds))

    def close(self) -> None:
        """Give back the files that no outcome took."""
        if self._timer is not None:
            self._timer.cancel()
        close_all([fd for fd in self.fds if fd >= 0])
        self._payload = self._result = self._output = -1

    def _finish(self, message: Message) -> None:
        finished = parse_finished(message, self.spec.limits)
        result = None
        if finished.verdict is Verdict.COMPLETED:
            _seal(self._result, finished.size)
            result, self._result = ResultFile(self._result, finished.size), -1
        self._settle(Outcome(finished.verdict, finished.description, result, finished.meta, self._level))

    def _settle(self, outcome: Outcome) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.outcome.set_result(outcome)


def _payload_file(payload: bytes | int) -> int:
    if isinstance(payload, int):
        return os.dup(payload)
    fd = os.memfd_create("edif-payload", os.MFD_CLOEXEC)
    view = memoryview(payload)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _result_file(limit: int) -> int:
    """An empty file that can hold `limit` bytes and never more; only what is written takes memory."""
    fd = os.memfd_create("edif-result", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, limit)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return fd


def _seal(fd: int, size: int) -> None:
    """Cut the result to its size and make sure that nobody who still holds it changes it any more."""
    if size > os.fstat(fd).st_size:
        raise ChannelError("an executor named a result size that its file does not have")
    os.ftruncate(fd, size)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        raise ChannelError("an executor that said it was done still had its result mapped for writing") from error
