"""The model host: loads one model, offline, and serves it. Holds no credentials.

At level `none` requests run in this process, one after the other; the next may already lie in the socket. Above that no
request is ever seen here: the weights go into a sealed file, and a zygote beside this process forks the executors.
A model that is split over several ranks has its rank 0 here, and the others in a `Group`.

    python -m edif_hpc.worker.host CHANNEL_FD PARENT_PID NAME
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections import deque
from typing import Any

from edif_hpc.core.errors import EdifError, HostDied, HostError
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import Kind
from edif_hpc.worker import companions, rank
from edif_hpc.worker.channel import Channel, Message, close_all
from edif_hpc.worker.contract import HostSpec, RunSpec, Verdict
from edif_hpc.worker.group import Group
from edif_hpc.worker.keeper import OWN_BYTES, become_keeper
from edif_hpc.worker.messages import Finished, finished_message, host_spec, host_spec_message, run_spec
from edif_hpc.worker.process import address_budget, guard_process, peak_bytes, private_bytes, zygote_environment


def main(agent: Channel) -> None:
    received = agent.receive()
    if received is None:
        return
    spec = host_spec(received[0])
    try:
        if spec.isolation is Isolation.NONE:
            _serve_here(spec, agent)
        else:
            _serve_through_zygote(spec, agent)
    except EdifError as error:
        agent.send({"type": "failed", "text": str(error), "died": isinstance(error, HostDied)})


# -- level none -------------------------------------------------------------------------------------------------------


def _serve_here(spec: HostSpec, agent: Channel) -> None:
    _tell(agent, "importing libraries")
    group = Group(spec, sys.argv[3]) if spec.ranks > 1 else None
    try:
        rank.import_libraries(spec.threads)
        _tell(agent, "loading the weights")
        runner, trouble, others = group.bring_up() if group else (*rank.bring_up(spec, 0, ""), 0)
        if trouble:
            _tell(agent, f"the warm-up request failed, which costs only time: {trouble}")
        memory = peak_bytes() + (others if spec.device == "cpu" else 0)
        agent.send({**_ready(Isolation.NONE, memory), "ranks": group.pids if group else []})
        Inline(spec, runner, agent, group).loop()
    finally:
        if group:
            group.close()


class Inline:
    """Runs requests in this process, and on the other ranks if there are any, in the order in which they come."""

    def __init__(self, spec: HostSpec, runner: Any, agent: Channel, group: Group | None = None) -> None:
        self._spec = spec
        self._runner = runner
        self._agent = agent
        self._group = group
        self._waiting: deque[tuple[Message, list[int]]] = deque()
        self._skipped: set[str] = set()

    def loop(self) -> None:
        """Serve until the agent is gone; HostError when the ranks are no longer together."""
        while self._take():
            self._run(*self._waiting.popleft())
            if self._group and self._group.trouble:
                raise HostError(self._group.trouble)

    def _take(self) -> bool:
        """Take what lies in the socket, and wait for a first one; False when the agent is gone."""
        ranks = self._group.channels if self._group else []
        while True:
            ready = select.select([self._agent, *ranks], [], [], 0 if self._waiting else None)[0]
            if self._group and ready and self._agent not in ready:
                raise HostError(self._group.lost())
            if not ready:
                return True
            received = self._agent.receive()
            if received is None:
                return False
            if received[0]["type"] == "skip":
                self._skipped.add(received[0]["run_id"])
            elif received[0]["type"] == "lend":
                self._lend()
            else:
                self._waiting.append(received)

    def _lend(self) -> None:
        """Move the weights into a sealed file that another host may map too, and go on from there: once."""
        from edif_hpc.worker import weights

        model = self._runner.model
        try:
            *lent, _ = weights.export(model)
        except HostError as error:
            self._agent.send({"type": "unlendable", "text": str(error)})
            return
        weights.attach(model, *lent)
        self._agent.send({"type": "lent"}, lent)
        close_all(lent)

    def _run(self, message: Message, fds: list[int]) -> None:
        own = 2 + (message["kind"] == Kind.SCRIPT)
        payload, result, *output = fds[:own]
        others = companions.received(message.get("companions", ()), fds[own:])
        try:
            if message["run_id"] in self._skipped:
                self._skipped.discard(message["run_id"])
                return
            spec = run_spec(message)
            self._agent.send({"type": "started", "run_id": spec.run_id})
            if self._group:
                self._group.begin(message, payload)
            finished = self._answer(spec, (payload, result, *output), others)
            if self._group:
                finished = self._group.conclude(finished, result)
            self._agent.send(finished_message(finished))
        finally:
            self._runner.others = {}
            close_all(fds)

    def _answer(self, spec: RunSpec, fds: tuple[int, ...], others: list[companions.Companion]) -> Finished:
        payload, result, *output = fds
        try:
            self._runner.others = {each.spec.model_key: companions.built(each) for each in others}
        except EdifError as error:
            return Finished(Verdict.FAILED, str(error))
        with address_budget(spec.limits.memory_bytes if self._spec.device == "cpu" else 0):
            finished: Finished = self._runner.run(
                spec, payload, result, lambda line: self._agent.send({"type": "log", "line": line}), *output
            )
        return finished


# -- levels process and locked ----------------------------------------------------------------------------------------


def _serve_through_zygote(spec: HostSpec, agent: Channel) -> None:
    if spec.spread:
        raise HostError("A model that is spread over devices is served at isolation none alone.")
    ours, theirs = Channel.pair()
    zygote = _start_zygote(spec, theirs)
    agents_end, zygotes_end = Channel.pair()
    ours.send(host_spec_message(spec), [zygotes_end.fileno()])
    theirs.close()
    zygotes_end.close()
    _tell(agent, "importing libraries")
    size, checksum, shared = _load_and_share(spec, agent, ours)
    answer = _await_zygote(ours, agent)
    memory = size + int(answer["private_bytes"]) + (OWN_BYTES if checksum is None else private_bytes())
    pidfd = os.pidfd_open(zygote.pid)
    ready = {**_ready(Isolation(answer["level"]), memory), "zygote": zygote.pid}
    agent.send(ready, [agents_end.fileno(), pidfd, *shared])
    close_all(shared)
    if checksum is None:
        os.set_inheritable(ours.fileno(), True)  # the zygote ends with this socket
        become_keeper(agent.fileno(), pidfd, os.getppid(), sys.argv[3])
    agents_end.close()
    _guard_device(agent, pidfd, checksum)
    zygote.kill()
    zygote.wait()


def _start_zygote(spec: HostSpec, channel: Channel) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "edif_hpc.worker.zygote", str(channel.fileno()), str(os.getpid())]
    return subprocess.Popen(
        [*command, sys.argv[3]],
        env=zygote_environment(os.environ),
        cwd=spec.scratch,
        stdin=subprocess.DEVNULL,
        pass_fds=(channel.fileno(),),
    )


def _load_and_share(spec: HostSpec, agent: Channel, zygote: Channel) -> tuple[int, Any, list[int]]:
    """Returns the size of the weights, for a device the checksum that guards them, and the descriptors of both."""
    import torch

    torch.set_num_threads(1)
    from edif_hpc.worker import model as models
    from edif_hpc.worker import weights

    _tell(agent, "loading the weights")
    model = models.load(spec, weights=True)
    _tell(agent, "sharing the weights")
    checksum = None
    if spec.device == "cpu":
        *shared, size = weights.export(model)
    else:
        from edif_hpc.worker import device_weights

        *shared, size = device_weights.export(model)
        checksum = device_weights.Checksum(model)
    # Where it has ended it has said why, and the caller reads that next.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        zygote.send({"type": "weights"}, shared)
    return size, checksum, shared


def _await_zygote(zygote: Channel, agent: Channel) -> Message:
    while True:
        received = zygote.receive()
        if received is None:
            raise HostDied("The zygote ended while it was made ready; the worker's log may say more.")
        message, _ = received
        if message["type"] == "ready":
            return message
        if message["type"] == "failed":
            raise HostError(message["text"])
        _tell(agent, message["text"])


def _guard_device(agent: Channel, zygote_pidfd: int, checksum: Any) -> None:
    """Stay, hold the weights on the device, and check them whenever a run has ended. Not run on any device yet."""
    poll = select.poll()
    poll.register(agent.fileno(), select.POLLIN)
    poll.register(zygote_pidfd, select.POLLIN)
    while zygote_pidfd not in (fd for fd, _ in poll.poll()):
        if agent.receive() is None or not checksum.intact():
            return


def _ready(level: Isolation, memory: int) -> Message:
    from nnsight.ndif import get_local_env

    return {"type": "ready", "level": level.value, "memory_bytes": memory, "environment": get_local_env()}


def _tell(agent: Channel, text: str) -> None:
    agent.send({"type": "progress", "text": text})


if __name__ == "__main__":
    guard_process(int(sys.argv[2]))
    main(Channel.from_fd(int(sys.argv[1])))
    os._exit(0)  # threads that a block left behind, or a process group that lost a rank, would keep this process
