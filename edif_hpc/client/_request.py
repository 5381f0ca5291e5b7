"""A request as its user holds it: sent once, followed from anywhere, found again on another day.

The handle is an nnsight backend as well: `model.trace(..., backend=handle)` sends the block. It needs nnsight only
for that and for what the block saved, so looking after requests needs no torch.
"""

from __future__ import annotations

import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from edif_hpc.core.scripts.files import OWN_FORM

from . import _download, _events, _formats, _loading, _shelf, _transfer
from ._connection import Connection, current
from ._errors import Misused, NotFinished, Refused
from ._progress import Progress, screen

IN_MEMORY_BYTES = 16 * 1024 * 1024
"""A smaller result never touches the disk."""


class Request:
    """One request of yours.

    Made by `submit()`, `get()` and `requests()`; not by hand.
    """

    def __init__(
        self,
        connection: Connection,
        request_id: str = "",
        *,
        model: Any = None,
        expected_seconds: float | None = None,
        progress: bool | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        self._connection = connection
        self._id = request_id
        self._key = uuid.uuid4().hex
        self._model = model
        self._expected_seconds = expected_seconds
        self._progress = connection.choices.progress if progress is None else progress
        self._record = record or {}
        self._lock = threading.RLock()
        self._cursor = _events.START
        self._lines: list[str] = []
        self._end: _events.Event | None = None
        self._values: dict[bool, dict[str, Any]] = {}

    def __repr__(self) -> str:
        if not self._id:
            return "<edif_hpc request, not sent yet>"
        known = self._end.status if self._end else self._record.get("status", "sent")
        return f"<edif_hpc request {self._id}: {known}>"

    # -- sending -------------------------------------------------------------------------------------------------------

    def __call__(self, tracer: Any = None) -> Any:
        """Send a block; nnsight calls this at the end of `with model.trace(..., backend=handle)`."""
        if tracer is None:
            raise Misused('A handle takes a block: with model.trace("...", backend=edif_hpc.submit()): ...')
        with Progress(screen(self._progress), "").shown() as progress:
            self._send(tracer, progress)
        return None

    def _send(self, tracer: Any, progress: Progress) -> None:
        from . import _sending

        if self._id:
            raise Misused(f"This handle carries request {self._id} already; make another with edif_hpc.submit().")
        packed = _sending.pack(tracer, self._model)
        self._model = None
        try:
            self._id = _sending.post(self._connection, packed, self._key, self._expected_seconds, progress.trouble)
        except KeyboardInterrupt:
            _say("Interrupted while it was sent; edif_hpc.requests() shows whether the request is there.")
            raise
        progress.named(self._id)

    # -- following -----------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Its name, for `edif_hpc.get(id)`, `edif-hpc status ID` and `edif-hpc cancel ID`.

        Raises:
            Misused: it was not sent yet.
        """
        if not self._id:
            raise Misused("This request was not sent yet: use the handle as the backend of a block first.")
        return self._id

    @property
    def status(self) -> str:
        """Where it is now: QUEUED, RUNNING, COMPLETED, ERROR, …; asks the service until it has ended."""
        return self._end.status if self._end else str(self.record()["status"])

    @property
    def meta(self) -> dict[str, Any] | None:
        """What the run cost, as `runtime` in seconds; None until it ended, or when it never ran."""
        if self._end is None:
            self._catch_up()
        return self._end.meta if self._end else None

    def record(self) -> dict[str, Any]:
        """All that the service says of it: model, times in Unix seconds, attempt, worker, `result_bytes`, …"""
        self._record = self._connection.get(f"/api/requests/{self.id}")
        return dict(self._record)

    def logs(self) -> list[str]:
        """The lines that the block has printed so far."""
        if self._end is None:
            self._catch_up()
        return list(self._lines)

    def wait(self, timeout: float | None = None) -> str:
        """Wait until it has ended; returns COMPLETED or ERROR.

        Through restarts of the service, dropped sockets and a laptop's sleep. Ctrl-C leaves the request running.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            NotFinished: it did not end in that time.
            Refused: the service knows it no longer.
            Unreachable: the service stayed away for half a day.
        """
        if self._end is None:
            with Progress(screen(self._progress), self.id).shown() as progress:
                self._wait(progress, timeout)
        return self.status

    def result(self, timeout: float | None = None, *, lazy: bool = False, trust: bool | None = None) -> dict[str, Any]:
        """What the block saved, by name; tensors on the CPU. Waits for it; a second call returns the same values.

        A result above 16 MiB is read to disk by several ranges at once. If that is interrupted, the next call, also of
        another process, reads only what is missing.

        Args:
            timeout: seconds to wait for the request's end; None waits for ever.
            lazy: map the file into memory: tensors are read when they are used, and the file stays in
                `~/.cache/edif-hpc` for a week after its last use.
            trust: load types that are not known to be harmless, which may run code that the result names; None: as
                `connect` was told.

        Raises:
            RequestFailed: it ended in ERROR; the text is the user's own traceback.
            NotFinished, Refused, Unreachable: as `wait`.
            DownloadFailed: the result cannot be read, or is kept no longer.
            UntrustedResult: it names a type that is not loaded without `trust`.
        """
        if lazy in self._values:
            return self._values[lazy]
        with Progress(screen(self._progress), self.id).shown() as progress:
            return self._result(progress, timeout, lazy=lazy, trust=trust)

    def download(self, path: str | Path) -> Path:
        """Read the result into a new file of your own, for `edif_hpc.load`; goes on where an earlier call stopped.

        Raises:
            Misused: there is something at `path` already, or no folder for it.
            RequestFailed, NotFinished, Refused, Unreachable, DownloadFailed: as `result`.
        """
        target = Path(path).expanduser().absolute()
        if target.exists():
            raise Misused(f"There is something at {target} already; remove it, or give another path.")
        if not target.parent.is_dir():
            raise Misused(f"There is no folder {target.parent}; make it, or give another path.")
        with Progress(screen(self._progress), self.id).shown() as progress:
            self._succeeded(progress, None)
            packed = _transfer.beside(target, self.id)
            self._read_into(target, packed, _download.Source(self._connection, self.id), progress)
        return target

    def cancel(self) -> str:
        """End it: `ended` (it had not run yet), `told` (its worker was), `done` (it had ended already)."""
        return str(self._connection.post(f"/api/requests/{self.id}/cancel")["outcome"])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _take(self, event: _events.Event) -> None:
        self._cursor = event.cursor
        if event.status == "LOG":
            self._lines.append(event.description)
        if event.terminal:
            self._end = event

    def _catch_up(self) -> None:
        with self._lock:
            for event in _events.read(self._connection, self.id, self._cursor):
                self._take(event)

    def _wait(self, progress: Progress, timeout: float | None, stop: threading.Event | None = None) -> None:
        try:
            with self._lock:
                if self._end is not None:
                    return
                events = _events.follow(
                    self._connection, self.id, self._cursor, seconds=timeout, trouble=progress.trouble, stop=stop
                )
                for event in events:
                    self._take(event)
                    progress.event(event)
        except KeyboardInterrupt:
            _say(self.farewell())
            raise
        if self._end is None and (stop is None or not stop.is_set()):
            raise NotFinished(f"Request {self.id} did not end within {timeout:g} s; it goes on, so wait again.")

    def farewell(self) -> str:
        """How to find it again, for who stops waiting."""
        return (
            f"Request {self.id} goes on without you: edif_hpc.get({self.id!r}) finds it again, also on another day, "
            "and .cancel() ends it."
        )

    def _succeeded(self, progress: Progress, timeout: float | None, stop: threading.Event | None = None) -> None:
        self._wait(progress, timeout, stop)
        if self._end is not None and self._end.status == "ERROR":
            from ._failed import RequestFailed

            raise RequestFailed(self._end.description, self.id, self._end.meta)

    def _result(
        self,
        progress: Progress,
        timeout: float | None,
        *,
        lazy: bool = False,
        trust: bool | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, Any]:
        if lazy not in self._values:
            self._succeeded(progress, timeout, stop)
            trusted = self._connection.choices.trust if trust is None else trust
            try:
                self._values[lazy] = self._load(progress, lazy=lazy, trust=trusted)
            except KeyboardInterrupt:
                _say(f"What was read of it stays: edif_hpc.get({self.id!r}).result() reads on.")
                raise
        return self._values[lazy]

    def _load(self, progress: Progress, *, lazy: bool, trust: bool) -> dict[str, Any]:
        kept = _shelf.place(self.id)
        if kept.exists():  # an earlier lazy result
            _shelf.touch(kept)
            return _loading.load(kept, lazy=lazy, trust=trust)
        source = _download.Source(self._connection, self.id)
        if form := source.transfer.form:
            what = "a file of its own" if form == OWN_FORM else f"a .{form} file"
            raise Misused(f"This request left {what}, which torch did not write: .download('FILE') fetches it.")
        if source.transfer.size <= IN_MEMORY_BYTES and not lazy:
            progress.download(source.transfer.size)
            packed = _download.into_memory(source, progress.advance)
            return _loading.load(_formats.unpack(packed), trust=trust)
        _shelf.prepare()
        self._read_into(kept, _transfer.beside(kept, "packed"), source, progress)
        values = _loading.load(kept, lazy=lazy, trust=trust)
        if not lazy:
            kept.unlink()
        return values

    def _read_into(self, target: Path, packed: Path, source: _download.Source, progress: Progress) -> None:
        """`packed`: where it lies until it is whole and unpacked; of this request alone."""
        progress.download(source.transfer.size)
        if not packed.exists():
            _download.into_file(source, packed, progress.advance, progress.recalled)
        _formats.unpack_file(packed, target, _formats.cores())


class Blocking(Request):
    """What `remote=True` means after `connect`: send the block, wait, and put what it saved into its variables."""

    def __call__(self, tracer: Any = None) -> Any:
        from . import _sending

        if tracer is None:
            raise Misused("remote=True takes a block: with model.trace(..., remote=True): ...")
        with Progress(screen(self._progress), "").shown() as progress:
            self._send(tracer, progress)
            values = self._result(progress, None)
        _sending.deliver(tracer, values)
        return values


def submit(model: Any = None, *, expected_seconds: float | None = None, progress: bool | None = None) -> Request:
    """A handle for one block: `with model.trace("...", backend=edif_hpc.submit() as …)`.

    The block is sent at the end of the `with`, which does not wait. Its variables stay unset; `handle.result()` has
    them.

        handle = edif_hpc.submit()
        with model.trace("The Eiffel Tower is in", backend=handle):
            logits = model.lm_head.output[0, -1].save()
        logits = handle.result()["logits"]

    Args:
        model: only for a `session` of a model that is no plain name.
        expected_seconds: how long the run will take, in your opinion; what fits no allocation is refused at once.
        progress: whether `wait` and `result` show a line; None as `connect` was told.

    Raises:
        NotConnected: no service is known.
    """
    return Request(current(), model=model, expected_seconds=expected_seconds, progress=progress)


def get(request_id: str) -> Request:
    """A request of yours, found again by its id, from any process and on any day until it expires.

    Raises:
        Refused: there is no such request of yours, or it has expired.
        NotConnected: no service is known.
    """
    if not request_id or not all(letter.isalnum() or letter == "-" for letter in request_id):
        raise Refused(f"{request_id!r} is no request's id; edif_hpc.requests() lists yours.", "unknown_request", 404)
    connection = current()
    return Request(connection, request_id, record=connection.get(f"/api/requests/{request_id}"))


def requests(limit: int = 20) -> list[Request]:
    """Your own recent requests, newest first, at most 500.

    Raises:
        NotConnected: no service is known.
    """
    connection = current()
    found = connection.get("/api/requests", {"limit": limit})["requests"]
    return [Request(connection, record["id"], record=record) for record in found]


def _say(sentence: str) -> None:
    """To whoever pressed Ctrl-C, whatever progress is shown."""
    print(sentence, file=sys.stderr, flush=True)
