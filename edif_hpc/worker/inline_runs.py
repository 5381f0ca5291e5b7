"""Runs at level `none`, seen from the agent: they lie in the model host's socket one behind the other.

The host takes the next one without asking, so nothing waits for the agent between two runs. The price: stopping one
that runs means killing the host, and those behind it are lost to another attempt. No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from edif_hpc.worker import companions
from edif_hpc.worker.channel import AsyncChannel, ChannelError, Message
from edif_hpc.worker.contract import Outcome, Verdict
from edif_hpc.worker.ends import explain
from edif_hpc.worker.runs import Run

CANCELLED = "The request was cancelled."
BEHIND = "The model host ended because of the request before this one, or was killed from outside."


class InlineRuns:
    """Sends runs down the host's channel and matches what comes back: the first in line is the one that runs."""

    def __init__(self, channel: AsyncChannel, kill_host: Callable[[], None], ranks: int = 1) -> None:
        self._channel = channel
        self._kill_host = kill_host
        self._ranks = ranks
        self._line: deque[Run] = deque()

    def pids(self) -> dict[str, int]:
        return {}

    async def run(self, run: Run) -> Outcome:
        self._line.append(run)
        messages, fds = companions.message_of(run.companions)
        self._channel.send(run.message | ({"companions": messages} if messages else {}), [*run.fds, *fds])
        return await run.outcome

    def hear(self, message: Message) -> None:
        """A message from the host about the run that is first in line."""
        if message.get("type") == "started":
            self._pass_over(str(message.get("run_id")))
        if not self._line:
            raise ChannelError("the model host spoke of a request that nobody sent")
        run = self._line[0]
        if run.outcome.done():  # cancelled in the moment it began
            self._kill_host()
            return
        run.hear(message)
        if message["type"] == "started":
            run.watch(lambda: self._time_is_up(run))
        if run.outcome.done():
            self._line.popleft()

    def cancel(self, run: Run) -> None:
        run.end(Verdict.CANCELLED, CANCELLED)
        if run.started:
            self._kill_host()
        else:
            self._channel.send({"type": "skip", "run_id": run.spec.run_id})

    def ended(self, status: int) -> None:
        """The host has ended with this wait status: the run that it had begun gets the blame, the others go on."""
        for run in self._line:
            if run.started:
                run.end(*explain(status, run.spec.limits.run_seconds, self._ranks))
            else:
                run.end(Verdict.LOST, BEHIND)
        self._line.clear()

    async def close(self) -> None:
        for run in self._line:
            run.end(Verdict.LOST, "The model host was stopped.")
        self._line.clear()

    def _time_is_up(self, run: Run) -> None:
        run.time_is_up()
        self._kill_host()

    def _pass_over(self, run_id: str) -> None:
        """Drop the cancelled ones that the host skipped without a word."""
        while self._line and self._line[0].spec.run_id != run_id:
            run = self._line.popleft()
            run.end(Verdict.LOST, "The model host passed this request over.")
