"""Messages between agent, model host, zygote and executor: one small JSON object each, with file descriptors beside it.

A SOCK_SEQPACKET unix socket keeps message boundaries and tells when the other side is gone. Large bytes never ride in
it: a payload and a result are anonymous files whose descriptors travel along (SCM_RIGHTS), so they are copied no more
than needed. One side may be a stranger, so sizes, descriptor counts and JSON are checked on receipt. No torch here.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

MESSAGE_BYTES = 128 * 1024
"""The largest message; below what the kernel's default socket buffer takes in one piece (208 KiB)."""
MAX_FDS = 24
"""Of one message: those of a run, and two for each model that is lent to it."""
_buffer = bytearray(MESSAGE_BYTES)
"""What every channel of this process receives into: one thread reads them all, and a message is decoded at once."""
BURST = 32
"""Messages handled per turn of the event loop, so that a chatty executor does not starve the others."""
Message = dict[str, Any]


class ChannelError(Exception):
    """The other side sent something that is no message, or this side tried to send one that is too large."""


class Channel:
    """One end of a channel, for blocking use. The descriptor is the socket's own; `detach` forgets it unclosed."""

    def __init__(self, sock: socket.socket, accept_fds: int = MAX_FDS) -> None:
        self._socket = sock
        self._accept_fds = accept_fds

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    @classmethod
    def from_fd(cls, fd: int, accept_fds: int = MAX_FDS) -> Channel:
        """Adopt an open descriptor. `accept_fds` 0: the other side may send none, the kernel drops them."""
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=fd), accept_fds)

    def fileno(self) -> int:
        return self._socket.fileno()

    def setblocking(self, blocking: bool) -> None:
        self._socket.setblocking(blocking)

    def detach(self) -> int:
        return self._socket.detach()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message; BlockingIOError when the socket is non-blocking and full, OSError when nobody is there."""
        self.send_bytes(encode(message), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if not fds:
            self._socket.send(data, socket.MSG_NOSIGNAL)  # a locked executor may not use sendmsg
            return
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, which the caller owns; None when the other side is gone."""
        space = socket.CMSG_SPACE(self._accept_fds * array.array("i").itemsize) if self._accept_fds else 0
        try:
            size, ancillary, flags, _ = self._socket.recvmsg_into([_buffer], space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it left without reading everything; what it had sent still lies here
            size, ancillary, flags, _ = self._socket.recvmsg_into([_buffer], space, socket.MSG_CMSG_CLOEXEC)
        fds = _descriptors(ancillary)
        if size == 0 and not fds:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ChannelError("a message was too large or carried descriptors that are not accepted")
            return decode(_buffer[:size]), fds
        except ChannelError:
            close_all(fds)
            raise


class AsyncChannel:
    """The agent's end: messages arrive by callback, sending never blocks and keeps order.

    `on_message(message, fds)` owns the descriptors. `on_end(error)` comes once: None when the other side closed, the
    error when it sent something that is no message. Closing this side calls neither.
    """

    def __init__(
        self,
        channel: Channel,
        on_message: Callable[[Message, list[int]], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        self._channel = channel
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._open = True
        channel.setblocking(False)
        self._loop.add_reader(channel.fileno(), self._read)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queue or send at once; descriptors that have to wait are duplicated, so the caller may close its own.

        A side that is gone is no error here: `on_end` tells.
        """
        if not self._open:
            return
        data = encode(message)
        if not self._outbox and self._try_send(data, fds):
            return
        self._outbox.append((data, [os.dup(fd) for fd in fds]))
        self._loop.add_writer(self._channel.fileno(), self._flush)

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        for _, fds in self._outbox:
            close_all(fds)
        self._outbox.clear()
        self._channel.close()

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            self._channel.send_bytes(data, fds)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            return True  # the reader will see the end
        return True

    def _flush(self) -> None:
        while self._outbox:
            data, fds = self._outbox[0]
            if not self._try_send(data, fds):
                return
            self._outbox.popleft()
            close_all(fds)
        self._loop.remove_writer(self._channel.fileno())

    def _read(self) -> None:
        for _ in range(BURST):
            if not self._open:
                return
            try:
                received = self._channel.receive()
            except BlockingIOError:
                return
            except (ChannelError, OSError) as error:
                self._end(error)
                return
            if received is None:
                self._end(None)
                return
            self._on_message(*received)

    def _end(self, error: Exception | None) -> None:
        self.close()
        self._on_end(error)


def encode(message: Message) -> bytes:
    data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    if len(data) > MESSAGE_BYTES:
        raise ChannelError(f"a message of {len(data):,} bytes is over the limit of {MESSAGE_BYTES:,}")
    return data


def decode(data: bytes | bytearray) -> Message:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChannelError("a message is not JSON") from error
    if not isinstance(message, dict):
        raise ChannelError("a message is not a JSON object")
    return message


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
