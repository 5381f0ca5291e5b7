"""Messages and descriptors over a socket, blocking and on an event loop, and what is refused."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from edif_hpc.worker.channel import MESSAGE_BYTES, AsyncChannel, Channel, ChannelError, close_all
from tests.worker.service import open_descriptors

pytestmark = pytest.mark.fast


def test_a_message_keeps_its_descriptors() -> None:
    left, right = Channel.pair()
    before = open_descriptors()
    read, write = os.pipe()
    left.send({"type": "x", "text": "ä"}, [write])
    os.close(write)
    received = right.receive()
    assert received is not None
    message, (fd,) = received
    assert message == {"type": "x", "text": "ä"}
    os.write(fd, b"hi")
    assert os.read(read, 2) == b"hi"
    assert not os.get_inheritable(fd)
    close_all([read, fd])
    left.close()
    assert right.receive() is None
    right.close()
    assert open_descriptors() == before - 2


def test_what_was_said_before_the_end_is_heard() -> None:
    left, right = Channel.pair()
    right.send({"never": "read"})
    left.send({"last": "word"})
    left.close()  # with an unread message, which resets the connection
    assert right.receive() == ({"last": "word"}, [])
    assert right.receive() is None
    right.close()


@pytest.mark.parametrize("data", [b"garbage", b"[1]", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    left, right = Channel.pair()
    left.send_bytes(data)
    with pytest.raises(ChannelError):
        right.receive()
    left.close()
    right.close()


def test_a_message_that_is_too_large_is_refused_on_both_sides() -> None:
    left, right = Channel.pair()
    with pytest.raises(ChannelError):
        left.send({"text": "x" * MESSAGE_BYTES})
    left.send_bytes(b" " * (MESSAGE_BYTES + 1))
    with pytest.raises(ChannelError):
        right.receive()
    left.close()
    right.close()


def test_descriptors_that_are_not_accepted_do_not_arrive() -> None:
    before = open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver, sender = Channel(ours, accept_fds=0), Channel(theirs)
    sender.send({"a": 1}, [0, 1, 2])
    with pytest.raises(ChannelError):
        receiver.receive()
    receiver.close()
    sender.close()
    assert open_descriptors() == before


def test_sending_on_a_loop_never_blocks_and_keeps_order() -> None:
    before = open_descriptors()

    async def play() -> list[Any]:
        left, right = Channel.pair()
        heard: list[Any] = []
        ended = asyncio.Event()

        def hear(message: dict[str, Any], fds: list[int]) -> None:
            heard.append((message["number"], len(fds)))
            close_all(fds)

        sender = AsyncChannel(left, lambda message, fds: None, lambda error: None)
        for number in range(500):  # far more than the socket takes
            sender.send({"number": number, "text": "x" * 5000}, [0] if number % 100 == 0 else [])
        receiver = AsyncChannel(right, hear, lambda error: ended.set())
        while len(heard) < 500:
            await asyncio.sleep(0.001)
        sender.close()
        await asyncio.wait_for(ended.wait(), 5)
        receiver.close()
        return heard

    assert asyncio.run(play()) == [(number, 1 if number % 100 == 0 else 0) for number in range(500)]
    assert open_descriptors() == before
