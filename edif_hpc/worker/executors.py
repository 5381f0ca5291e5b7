"""The agent's executors: waiting spares, those at work, and how each ended. No torch here.

The zygote forks when asked and reports every end; each executor talks to the agent over its own channel, and is killed
through a pidfd, so that a kill never hits a stranger. An executor is used once.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable

from edif_hpc.worker import companions
from edif_hpc.worker.channel import AsyncChannel, Channel, ChannelError, Message, close_all
from edif_hpc.worker.contract import Outcome, Verdict
from edif_hpc.worker.ends import explain
from edif_hpc.worker.inline_runs import CANCELLED
from edif_hpc.worker.messages import plain
from edif_hpc.worker.process import kill
from edif_hpc.worker.runs import Run

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a spare that died is replaced; doubled each time, until one has worked."""
GIVE_UP_AFTER = 8
"""So many spares in a row that never worked, and the host counts as broken."""


class Executor:
    """One forked process, from the fork to its end."""

    def __init__(self, pool: Executors, pid: int, pidfd: int, channel_fd: int, ordered_by: Run | None = None) -> None:
        self.pid = pid
        self.run: Run | None = None
        self.ordered_by = ordered_by
        """The run that it was made for, if it was."""
        self.status: int | None = None
        self.prepared = False
        self.trouble = ""
        self._pool = pool
        self.pidfd = pidfd
        self._silent = False
        self._channel = AsyncChannel(Channel.from_fd(channel_fd, accept_fds=0), self._hear, self._channel_ended)

    def start(self, run: Run) -> None:
        self.run = run
        run.watch(self._time_is_up)
        self._channel.send(run.message, run.fds)

    def kill(self) -> None:
        if self.pidfd >= 0:
            kill(self.pidfd)

    def exited(self, status: int) -> None:
        """The zygote has reaped it. What it had said before may still lie in the channel."""
        self.status = status
        self._conclude()

    def close(self) -> None:
        self._channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _hear(self, message: Message, fds: list[int]) -> None:
        try:
            if message.get("type") == "broken":
                self._broke(plain(str(message.get("text"))[:500]))
            elif self.run is not None:
                if not self.run.outcome.done():
                    self.run.hear(message)
                if self.run.outcome.done():
                    self.kill()  # it has nothing more to say, whatever threads it left behind
            elif message.get("type") == "prepared":
                self.prepared = True
                self._pool.prepared(self)
            else:
                raise ChannelError("an executor spoke before it was asked")
        except ChannelError as error:
            self._misbehaved(error)

    def _broke(self, trouble: str) -> None:
        """Our own code in the executor failed, or a request's code says so: either way nobody would watch it further.

        Once the request runs, what fails there fails because of it, and would again.
        """
        self.trouble = trouble
        if self.run is not None and self.run.started:
            self.run.end(Verdict.FAILED, f"The request's code broke the process that ran it: {trouble}.")
        elif self.run is not None:
            self.run.end(Verdict.LOST, f"The executor failed: {trouble}")
        self.kill()

    def _channel_ended(self, error: Exception | None) -> None:
        self._silent = True
        if isinstance(error, ChannelError):
            self._misbehaved(error)
        self._conclude()

    def _misbehaved(self, error: ChannelError) -> None:
        if self.run is not None:
            self.run.end(Verdict.FAILED, f"The request's code meddled with its own executor: {error}.")
        self.kill()

    def _time_is_up(self) -> None:
        if self.run is not None:
            self.run.time_is_up()
        self.kill()

    def _conclude(self) -> None:
        if self.status is None or not self._silent:
            return
        if self.run is not None:
            self.run.end(*explain(self.status, self.run.spec.limits.run_seconds))
        self._pool.gone(self)


class Executors:
    """Keeps `spares` executors ahead of need and gives one to each run.

    Args:
        zygote: the channel to the zygote; owned.
        spares: how many wait.
        on_broken: called once with a sentence when no executor can be had any more.
        at_once: how many run at a time, the others wait in line here; 0 for as many as there are.
    """

    def __init__(self, zygote: Channel, spares: int, on_broken: Callable[[str], None], at_once: int = 0) -> None:
        self._at_once = at_once
        self._working = 0
        self._zygote = AsyncChannel(zygote, self._hear, self._zygote_ended)
        self._spares = spares
        self._on_broken = on_broken
        self._all: dict[int, Executor] = {}
        self._ready: deque[Executor] = deque()
        self._wanted: deque[Run] = deque()
        self._orders: dict[int, Run] = {}
        self._ordered: deque[Executor] = deque()
        self._order = 0
        self._asked = 0
        self._failures = 0
        self._pause: asyncio.TimerHandle | None = None
        self._refill()

    def pids(self) -> dict[str, int]:
        return {f"executor-{pid}": pid for pid in self._all}

    async def run(self, run: Run) -> Outcome:
        if run.companions:
            self._make_to_order(run)
        else:
            self._wanted.append(run)
            self._match()
        return await run.outcome

    def _make_to_order(self, run: Run) -> None:
        """Have an executor forked that maps other models too."""
        self._order += 1
        self._orders[self._order] = run
        messages, fds = companions.message_of(run.companions)
        self._zygote.send({"type": "fork", "order": self._order, "companions": messages}, fds)

    def cancel(self, run: Run) -> None:
        run.end(Verdict.CANCELLED, CANCELLED)
        for executor in self._all.values():
            if run in (executor.run, executor.ordered_by):
                executor.kill()

    def ended(self, status: int) -> None:
        """The host has ended, and with it the zygote and every executor."""
        self._lose("The model host ended while the request ran.")

    async def close(self) -> None:
        """End all executors and wait until they are gone."""
        self._lose("The model host was stopped.")
        self._zygote.close()
        if self._pause is not None:
            self._pause.cancel()
        executors, self._all = list(self._all.values()), {}
        for executor in executors:
            executor.kill()
        for executor in executors:
            await gone(executor.pidfd)
            executor.close()

    def prepared(self, executor: Executor) -> None:
        if executor.ordered_by is not None:
            self._ordered.append(executor)
        else:
            self._asked -= 1
            self._ready.append(executor)
        self._match()

    def gone(self, executor: Executor) -> None:
        self._all.pop(executor.pid, None)
        executor.close()
        if executor.run is not None:
            return
        if executor.ordered_by is not None:
            if executor in self._ordered:
                self._ordered.remove(executor)
            why = executor.trouble or explain(executor.status or 0, 0)[1]
            executor.ordered_by.end(Verdict.LOST, f"The executor for several models could not be made ready: {why}")
            return
        if executor.prepared:
            self._ready.remove(executor)
        else:
            self._asked -= 1
        self._back_off(executor)

    def _match(self) -> None:
        while self._ordered and self._may_work:
            executor = self._ordered.popleft()
            if executor.ordered_by is not None and not executor.ordered_by.outcome.done():
                self._begin(executor, executor.ordered_by)
            else:
                executor.kill()
        while self._wanted and self._ready and self._may_work:
            run = self._wanted.popleft()
            if not run.outcome.done():
                self._failures = 0
                self._begin(self._ready.popleft(), run)
        self._refill()

    @property
    def _may_work(self) -> bool:
        return not (self._at_once and self._working >= self._at_once)

    def _begin(self, executor: Executor, run: Run) -> None:
        self._working += 1
        run.outcome.add_done_callback(self._run_ended)
        executor.start(run)

    def _run_ended(self, _: asyncio.Future[Outcome]) -> None:
        self._working -= 1
        if self._wanted or self._ordered:
            self._match()

    def _refill(self) -> None:
        if self._pause is not None:
            return
        missing = self._spares + len(self._wanted) - len(self._ready) - self._asked
        for _ in range(max(missing, 0)):
            self._asked += 1
            self._zygote.send({"type": "fork"})

    def _back_off(self, executor: Executor) -> None:
        self._failures += 1
        if self._failures >= GIVE_UP_AFTER:
            why = executor.trouble or explain(executor.status or 0, 0)[1]
            sentence = f"No executor could be prepared, {self._failures} times in a row: {why}"
            self._lose(sentence)
            self._on_broken(sentence)
            return
        if self._pause is None:
            seconds = min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE)
            self._pause = asyncio.get_running_loop().call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._refill()

    def _hear(self, message: Message, fds: list[int]) -> None:
        if message["type"] == "spare":
            pidfd, channel_fd = fds
            run = self._orders.pop(message["order"], None)
            made = self._all[message["pid"]] = Executor(self, message["pid"], pidfd, channel_fd, run)
            if run is not None and run.outcome.done():
                made.kill()
        else:
            close_all(fds)
            executor = self._all.get(message["pid"])
            if executor is not None:
                executor.exited(message["status"])

    def _zygote_ended(self, error: Exception | None) -> None:
        self._lose("The zygote ended while the request ran.")
        self._on_broken("The zygote ended.")

    def _lose(self, why: str) -> None:
        held = [executor.run or executor.ordered_by for executor in self._all.values()]
        for run in (*held, *self._orders.values(), *self._wanted):
            if run is not None:
                run.end(Verdict.LOST, why)
        self._wanted.clear()
        self._orders.clear()


async def gone(pidfd: int) -> None:
    """Wait for the end of a process that is not our child."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
