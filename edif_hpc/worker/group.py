"""The other ranks of a model host, seen from rank 0: started, given each request, compared, and ended with it.

A rank that dies, or takes other steps than the others, leaves them in collectives that nobody completes. Nothing of
such a group can be used again, so its request fails with a sentence, the model host ends, and the agent brings up
another one. Ranks wait for one another for `rank_seconds` and no longer. Where all took the same steps and only what
they saved differs, the request fails and the group stays.
What this module must not know: who asked, and the agent. No torch at import, so that all ranks import it side by side.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from edif_hpc.core.errors import HostDied, HostError
from edif_hpc.worker import rank
from edif_hpc.worker.channel import Channel, Message
from edif_hpc.worker.contract import HostSpec, Verdict
from edif_hpc.worker.ends import diverged_sentence, lost_rank_sentence
from edif_hpc.worker.messages import Finished, host_spec_message

IMPORT_SECONDS = 600.0
"""For a rank to import its libraries, from a file system that may be slow."""
GRACE_SECONDS = 5.0
"""Beyond the time that a collective takes to give up, for a rank to say so."""


class Follower:
    """One of the other ranks."""

    def __init__(self, spec: HostSpec, name: str, number: int, meeting: str) -> None:
        ours, theirs = Channel.pair()
        command = [sys.executable, "-P", "-m", "edif_hpc.worker.rank", str(theirs.fileno()), str(os.getpid())]
        self.number = number
        self.process = subprocess.Popen(
            [*command, name, str(number), meeting],
            env={**os.environ, **rank.environment(spec, number)},
            cwd=spec.scratch,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        self.channel = ours

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        try:
            self.channel.send(message, fds)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has ended: `hear` tells

    def hear(self, deadline: float | None = None) -> Message | None:
        """What it says next; None when it has ended, or was silent until then."""
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([self.channel], [], [], patience)[0]:
            return None
        received = self.channel.receive()
        return received[0] if received else None

    def how_it_ended(self) -> str:
        """`was killed by SIGKILL`, `ended with exit code 1`; empty while it lives."""
        try:
            code = self.process.wait(timeout=1.0)  # its channel closes a moment before it can be reaped
        except subprocess.TimeoutExpired:
            return ""
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Group:
    """Ranks 1 to n-1. `trouble` says what broke it; a broken one must not be used any more."""

    def __init__(self, spec: HostSpec, name: str) -> None:
        self._spec = spec
        self._name = name
        self._own = rank.own_spec(spec, 0)
        self._meeting = str(spec.scratch / f"ranks-{os.getpid()}")
        self.trouble = ""
        self._forget_meeting()
        os.environ.update(rank.environment(spec, 0))
        self._followers = [Follower(spec, name, number, self._meeting) for number in range(1, spec.ranks)]
        for follower in self._followers:
            follower.send(host_spec_message(spec))

    @property
    def channels(self) -> list[Channel]:
        """Readable between requests only when a rank has ended."""
        return [follower.channel for follower in self._followers]

    @property
    def pids(self) -> list[int]:
        return [follower.process.pid for follower in self._followers]

    def bring_up(self) -> tuple[Any, str, int]:
        """Load the model on all ranks.

        Returns:
            Rank 0's runner, what went wrong with the first request, and the memory of the other ranks in bytes.

        Raises:
            HostError: naming the rank that could not, and why.
        """
        joining = self._await("joining", time.monotonic() + IMPORT_SECONDS)
        if silent := len(self._followers) - len(joining):
            raise HostError(f"{silent} of {self._spec.ranks} ranks did not begin within {IMPORT_SECONDS:.0f} s.")
        try:
            runner, trouble = rank.bring_up(self._own, 0, self._meeting)
        except HostError:
            self._await("ready", time.monotonic() + GRACE_SECONDS)  # perhaps another rank knows better why
            raise
        memory = sum(
            int(message["memory_bytes"]) for message in self._await("ready", time.monotonic() + rank.LOAD_SECONDS)
        )
        if lost := self._out_of_step():
            raise HostError(f"The {self._spec.ranks} ranks lost one another while they loaded: {lost}")
        self._forget_meeting()
        return runner, trouble, memory

    def begin(self, message: Message, payload: int) -> None:
        """Have every rank run a request, with random numbers in common; to be called just before rank 0 runs it."""
        number = int.from_bytes(os.urandom(4), "little")
        for follower in self._followers:
            follower.send({**message, "seed": number}, (payload,))
        rank.seed(number)

    def conclude(self, finished: Finished, result: int) -> Finished:
        """What the agent is told: rank 0's outcome if every rank came to the same, else a sentence."""
        own = rank.report(finished, result)
        reports = [own]
        deadline = time.monotonic() + self._spec.rank_seconds + GRACE_SECONDS
        for follower in self._followers:
            message = follower.hear(deadline)
            if message is None:
                self.trouble = self._why_silent(follower)
                return Finished(Verdict.FAILED, self.trouble, 0, own.meta)
            reports.append(rank.parse_report(message))
        different, together = _difference(reports), len({one.collectives for one in reports}) == 1
        if not together or (lost := self._out_of_step()):
            self.trouble = diverged_sentence(self._name, self._spec.ranks, different or own.said or lost)
        if different or self.trouble:
            sentence = self.trouble or diverged_sentence(self._name, self._spec.ranks, different)
            return Finished(Verdict.FAILED, sentence, 0, own.meta)
        return Finished(finished.verdict, finished.description, finished.size, _together([one.meta for one in reports]))

    def close(self) -> None:
        """Kill the other ranks and wait until they are gone."""
        for follower in self._followers:
            follower.process.kill()
        for follower in self._followers:
            follower.process.wait()
            follower.channel.close()
        self._forget_meeting()

    def lost(self) -> str:
        """Which rank ended while nothing ran, as a sentence."""
        ended = next((one for one in self._followers if select.select([one.channel], [], [], 0)[0]), None)
        how = ended.how_it_ended() if ended else "is out of step"
        return f"Rank {ended.number if ended else '?'} of the {self._spec.ranks} that hold {self._name} {how}."

    def _why_silent(self, follower: Follower) -> str:
        how = follower.how_it_ended()
        if how:
            return lost_rank_sentence(self._name, self._spec.ranks, follower.number, how)
        return diverged_sentence(self._name, self._spec.ranks, f"rank {follower.number} did not come to an end")

    def _out_of_step(self) -> str:
        """Meet once more: counts and results can agree, and ranks still wait in collectives of the past."""
        for follower in self._followers:
            follower.send({"type": "check"})
        troubles = [rank.in_step(self._own.device)]
        deadline = time.monotonic() + self._spec.rank_seconds + GRACE_SECONDS
        for follower in self._followers:
            message = follower.hear(deadline)
            troubles.append(str(message["trouble"]) if message else f"rank {follower.number} is silent")
        return next(filter(None, troubles), "")

    def _await(self, kind: str, deadline: float | None = None) -> list[Message]:
        """What every other rank says next, which has to be of this kind; those silent until the deadline are left out.

        Raises:
            HostError: one of them cannot serve, or has ended.
        """
        messages = []
        for follower in self._followers:
            message = follower.hear(deadline)
            which = f"Rank {follower.number} of {self._spec.ranks}"
            if message is None and (how := follower.how_it_ended()):
                raise HostDied(f"{which} {how} while it loaded; the worker's log says more.")
            if message is not None and message["type"] != kind:
                raise HostError(f"{which}: {message.get('text', 'it is out of step')}")
            messages += [message] if message else []
        return messages

    def _forget_meeting(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._meeting)


def _difference(reports: list[rank.Report]) -> str:
    """In what ranks differ, in words; empty when they do not."""
    own = reports[0]
    for number, other in enumerate(reports[1:], 1):
        if other.verdict != own.verdict or other.collectives != own.collectives:
            return f"{_ending(0, own)}, {_ending(number, other)}"
        if other.digest != own.digest:
            return f"rank {number} saved other values than rank 0"
    return ""


def _ending(number: int, report: rank.Report) -> str:
    how = f"failed with {report.said!r}" if report.verdict == Verdict.FAILED else report.verdict
    return f"rank {number} {how} after {report.collectives} exchanges"


def _together(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run cost on all ranks: the memory of each, by its own GPU or summed, and rank 0's time."""
    meta = dict(metas[0])
    meta["max_memory_usage"] = sum(one["max_memory_usage"] for one in metas)
    for key in ("max_mem_by_gpu", "max_mem_pct_by_gpu", "alloc_shortfall_by_gpu"):
        found = {gpu: value for one in metas for gpu, value in one.get(key, {}).items()}
        if key in meta or found:
            meta[key] = found
    return meta
