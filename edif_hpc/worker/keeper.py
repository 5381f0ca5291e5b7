"""What a model host becomes once its weights are shared: the same process, without torch.

The sealed weights live in the zygote and its executors, so the host's own 280 MB of libraries serve nobody. It replaces
itself with this program, keeps its pid, its children and its ties, and waits for the agent's or the zygote's end.

    python -m edif_hpc.worker.keeper CHANNEL_FD ZYGOTE_PIDFD PARENT_PID NAME
"""

from __future__ import annotations

import os
import select
import sys
from typing import NoReturn

from edif_hpc.worker.process import guard_process, kill

OWN_BYTES = 16 * 1024 * 1024
"""About what this program costs."""


def become_keeper(channel_fd: int, zygote_pidfd: int, parent: int, name: str) -> NoReturn:
    """Replace the calling process; its children stay its children."""
    for fd in (channel_fd, zygote_pidfd):
        os.set_inheritable(fd, True)
    numbers = [str(number) for number in (channel_fd, zygote_pidfd, parent)]
    command = [sys.executable, "-P", "-m", "edif_hpc.worker.keeper", *numbers, name]
    os.execv(sys.executable, command)  # noqa: S606 - a list, no shell


def keep(channel_fd: int, zygote_pidfd: int) -> None:
    """Wait; then take the zygote along. Its executors follow it."""
    poll = select.poll()
    poll.register(channel_fd, 0)  # the agent sends nothing any more: only its end counts
    poll.register(zygote_pidfd, select.POLLIN)
    poll.poll()
    kill(zygote_pidfd)
    os.waitid(os.P_PIDFD, zygote_pidfd, os.WEXITED)


if __name__ == "__main__":
    guard_process(int(sys.argv[3]))
    keep(int(sys.argv[1]), int(sys.argv[2]))
