"""The other models of a script that needs several: lent by their hosts, mapped into the one process that runs it.

A model host lends what its own executors map: the sealed weights and what lies where in them, on a device the handles.
The process that gets them builds each model on meta and maps its weights privately, before it is locked down and before
anything of the script is read, so it needs no right to the model cache afterwards and what it writes stays its own.

    agent -> zygote  fork (+ descriptors): an executor made to order, which no other request gets
    agent -> host    run (+ descriptors behind its own), at level `none`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edif_hpc.worker.channel import ChannelError, Message, close_all
from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.messages import host_spec, host_spec_message

ON_CPU, ON_DEVICE = 2, 1
"""Descriptors of a lent model: weights and manifest, or handles."""


@dataclass(frozen=True)
class Companion:
    """One lent model. The descriptors belong to whoever holds this."""

    spec: HostSpec
    fds: tuple[int, ...]


def message_of(companions: Sequence[Companion]) -> tuple[list[Message], list[int]]:
    """What a message says of them, and the descriptors that go with it."""
    return [host_spec_message(each.spec) for each in companions], [fd for each in companions for fd in each.fds]


def received(messages: Sequence[Message], fds: Sequence[int]) -> list[Companion]:
    """The other end of `message_of`."""
    found, rest = [], list(fds)
    for message in messages:
        spec = host_spec(message)
        count = ON_CPU if spec.device == "cpu" else ON_DEVICE
        found.append(Companion(spec, tuple(rest[:count])))
        del rest[:count]
    if rest or any(not each.fds for each in found):
        close_all(fds)
        raise ChannelError("models were lent with another number of descriptors than they have")
    return found


def built(companion: Companion) -> Any:
    """The model, with its weights where they lie in memory; on a device it gets them later, from `attach`."""
    from edif_hpc.worker import model as models
    from edif_hpc.worker import weights

    model = models.load(companion.spec, weights=False)
    if companion.spec.device == "cpu":
        weights.attach(model, *companion.fds)
    return model


def attach(companion: Companion, model: Any, fd: int) -> None:
    """Give a model on a device its weights, in a process that has been locked down. Not run on any device yet.

    Args:
        fd: what the descriptor of its handles has become.
    """
    from edif_hpc.worker import device_weights

    device_weights.attach(model, fd, companion.spec.device)
    os.close(fd)
