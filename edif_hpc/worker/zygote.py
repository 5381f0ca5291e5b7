"""The process that executors are forked from: it has everything imported and the model built, and holds no secret.

It was exec'd with a clean environment, builds the model on meta, maps the host's sealed weights privately, runs one
trusted request, and from then on only forks and reaps. It never sees a request. No second thread may exist here and no
parallel region may run: a fork would inherit locks that nobody releases.

    python -m edif_hpc.worker.zygote HOST_CHANNEL_FD PARENT_PID
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

from edif_hpc.core.errors import EdifError, HostError
from edif_hpc.core.isolation import Isolation
from edif_hpc.worker import companions, huge_pages, prefault, sandbox
from edif_hpc.worker.channel import Channel, close_all
from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.executor import Preparation, adapter_paths, serve
from edif_hpc.worker.messages import host_spec
from edif_hpc.worker.process import become_subreaper, guard_process, own_tasks, private_bytes

SPARE_TASKS = 256
"""How many processes and threads more than this user had lately there may be while an executor runs, in all executors.
What else the user starts on the machine counts too, so it must not be few; and what one block takes the others cannot
have, so it must not be many. With one thread per request an honest one needs none of them."""
COUNT_SECONDS = 5.0
"""How old that count may be: on a large machine it takes longer than a fork."""


def main(host: Channel) -> None:
    message, (agent_fd,) = _expect(host, "spec")
    try:
        preparation = _build(host_spec(message), host)
    except EdifError as error:
        host.send({"type": "failed", "text": str(error)})
        return
    host.send({"type": "ready", "level": preparation.level.value, "private_bytes": private_bytes()})
    Zygote(preparation, host, Channel.from_fd(agent_fd)).loop()


def _build(spec: HostSpec, host: Channel) -> Preparation:
    reach = sandbox.probe()
    level = min(spec.isolation, reach.level, key=lambda each: each.rank)
    if not level.covers(spec.required):
        raise HostError(
            f"This machine reaches isolation level {level.value}, but {spec.required.value} is required: "
            f"{' '.join(reach.reasons) or 'see `edif-hpc doctor`.'}"
        )
    import torch

    torch.set_num_threads(1)
    from edif_hpc.worker import model as models
    from edif_hpc.worker import weights
    from edif_hpc.worker.run import Runner
    from edif_hpc.worker.warmup import warm_up

    if spec.adapters:
        import peft  # noqa: F401 - takes a second, which no request should wait for
    import edif_hpc.toolkit  # noqa: F401 - requests that call it would wait 50 ms for it, from a checkout 400 ms

    model = models.load(spec, weights=False)
    runner = Runner(model, spec.model_key, spec.devices, spec.adapters, spec.threads)
    runner.prepare()
    huge_pages.collapse()
    _, shared = _expect(host, "weights")
    pages: tuple[prefault.Span, ...] = ()
    if spec.device == "cpu":
        weights.attach(model, *shared)
        trouble = warm_up(runner)
        if trouble:
            host.send({"type": "progress", "text": f"the warm-up request failed, which costs only time: {trouble}"})
    # On a device each executor opens them itself: a process that touched it may not fork.
    models.settle()
    if spec.device == "cpu":
        pages = prefault.learn(lambda: warm_up(runner))
        if not pages:
            host.send({"type": "progress", "text": "the pages of a run could not be learnt, which costs only time"})
    readable = adapter_paths(spec.adapters.values())
    return Preparation(spec, runner, reach, level, os.getpid(), tuple(shared), pages, readable)


class Zygote:
    """Forks when the agent asks, tells how each executor ended, and ends with host or agent."""

    def __init__(self, preparation: Preparation, host: Channel, agent: Channel) -> None:
        self._preparation = preparation
        self._host = host
        self._agent = agent
        self._executors: dict[int, int] = {}  # pidfd -> pid
        self._poll = select.poll()
        self._counted: tuple[float, int] = (0.0, 0)

    def loop(self) -> None:
        become_subreaper()
        for channel in (self._host, self._agent):
            self._poll.register(channel.fileno(), select.POLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._executors:
                    self._reap(fd)
                elif not self._hear(self._host if fd == self._host.fileno() else self._agent):
                    return

    def _hear(self, channel: Channel) -> bool:
        received = channel.receive()
        if received is None:
            return False
        message, fds = received
        if message["type"] == "fork":
            self._fork(int(message.get("order", 0)), companions.received(message.get("companions", ()), fds))
        close_all(fds)
        return True

    def _fork(self, order: int, others: list[companions.Companion]) -> None:
        processes = self._process_limit()
        ours, theirs = Channel.pair()
        pid = os.fork()
        if pid == 0:
            serve(self._preparation, theirs, processes, others)
        pidfd = os.pidfd_open(pid)
        self._executors[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._agent.send({"type": "spare", "pid": pid, "order": order}, [pidfd, ours.fileno()])
        ours.close()
        theirs.close()

    def _process_limit(self) -> int:
        until, processes = self._counted
        if time.monotonic() >= until:
            processes = own_tasks() + SPARE_TASKS
            self._counted = (time.monotonic() + COUNT_SECONDS, processes)
        return processes

    def _reap(self, pidfd: int) -> None:
        pid = self._executors.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        self._agent.send(
            {"type": "exit", "pid": pid, "status": status, "peak_bytes": usage.ru_maxrss * 1024,
             "cpu_seconds": usage.ru_utime + usage.ru_stime}
        )  # fmt: skip
        if self._preparation.level is Isolation.PROCESS:
            self._end_strays()

    def _end_strays(self) -> None:
        """Kill what an executor forked: a subreaper inherits it when its parent has gone."""
        known = set(self._executors.values())
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while strays := [pid for pid in map(int, children.read_text().split()) if pid not in known]:
            for pid in strays:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _expect(channel: Channel, kind: str) -> tuple[dict[str, object], list[int]]:
    received = channel.receive()
    if received is None:
        sys.exit(0)  # the host is gone
    if received[0].get("type") != kind:
        raise HostError(f"The zygote heard {received[0].get('type')!r} where {kind!r} was due: a component differs.")
    return received


if __name__ == "__main__":
    guard_process(int(sys.argv[2]))
    main(Channel.from_fd(int(sys.argv[1])))
