"""Reading a request's body as it arrives: a short envelope, and a payload that never grows past its limit.

A payload beyond what rides in Redis goes to an unnamed file in the spool, so that many large ones do not fill the
gateway's memory.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from edif_hpc.core.errors import EnvelopeError, PayloadTooLarge, Unavailable

ENVELOPE_BYTES = 64 * 1024
MOST_PARTS = 16
STALL_SECONDS = 60.0
"""A client that sends nothing for so long is given up."""

HINT = "send it with a stock nnsight client"


class Payload:
    """Opaque bytes: in memory up to `threshold`, in an unnamed file beyond. Close it."""

    def __init__(self, threshold: int, folder: Path) -> None:
        self.size = 0
        self._threshold = threshold
        self._folder = folder
        self._memory = bytearray()
        self._file: IO[bytes] | None = None

    def write(self, data: memoryview | bytes) -> None:
        self.size += len(data)
        if self._file is None and self.size <= self._threshold:
            self._memory += data
            return
        try:
            if self._file is None:
                self._file = os.fdopen(os.open(self._folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "w+b")
                self._file.write(self._memory)
                self._memory = bytearray()
            self._file.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Unavailable("The service has no disk space left for payloads; try again later.") from error

    def in_memory(self) -> bytes:
        """The bytes of a payload that stayed below the threshold."""
        return bytes(self._memory)

    def file(self) -> IO[bytes]:
        """The payload as a file, from its start."""
        if self._file is None:
            return io.BytesIO(self._memory)
        self._file.seek(0)
        return self._file

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Form:
    """Collects the parts `data` and `blob`; others are dropped."""

    def __init__(self, boundary: bytes, payload: Payload) -> None:
        self.envelope = bytearray()
        self.payload = payload
        self.complete = False
        self._seen: set[bytes] = set()
        self._parts = 0
        self._part: bytes = b""
        self._field, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def _begin(self) -> None:
        self._parts += 1
        self._headers = {}
        if self._parts > MOST_PARTS:
            raise EnvelopeError(f"The request's body has more than {MOST_PARTS} parts; {HINT}.")

    def _header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._part = options.get(b"name", b"")
        if self._part in self._seen:
            raise EnvelopeError(f"The request's body has the part {self._part.decode(errors='replace')!r} twice.")
        if self._part in (b"data", b"blob"):
            self._seen.add(self._part)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part == b"blob":
            self.payload.write(memoryview(data)[start:end])
        elif self._part == b"data":
            self.envelope += data[start:end]
            if len(self.envelope) > ENVELOPE_BYTES:
                raise EnvelopeError(f"The request's envelope is larger than {ENVELOPE_BYTES} bytes; {HINT}.")

    def _end(self) -> None:
        self.complete = True

    def check(self) -> None:
        if not self.complete:
            raise EnvelopeError(f"The request's body ends in the middle of a part; {HINT}.")
        for part, what in ((b"data", "envelope"), (b"blob", "payload")):
            if part not in self._seen:
                raise EnvelopeError(f"The request has no {what} (the form part {part.decode()!r}); {HINT}.")
        if not self.payload.size:
            raise EnvelopeError(f"The request's payload is empty; {HINT}.")


async def read_form(request: Request, payload: Payload, limit: int) -> bytes:
    """Read the whole body: the payload into `payload`, the envelope as the answer.

    Raises:
        PayloadTooLarge: before anything is read if the client said so, else at the first byte too many.
        EnvelopeError: the body is not the form a client sends.
        ClientDisconnect: the client went away or stalled.
    """
    too_large = PayloadTooLarge(
        f"The request's body is larger than {limit} bytes, the limit here (limits.payload_bytes); "
        "save data on the server's side or send less."
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise EnvelopeError(f"The request is not a multipart form; {HINT}.")
    received = 0
    try:
        form = Form(options[b"boundary"], payload)
        async for chunk in _chunks(request):
            received += len(chunk)
            if received > limit:
                raise too_large
            form.parser.write(chunk)
    except FormParserError as error:
        raise EnvelopeError(f"The request's body is not a well-formed multipart form ({error}); {HINT}.") from None
    form.check()
    return bytes(form.envelope)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                message = await request.receive()
        except TimeoutError:
            raise ClientDisconnect from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return
