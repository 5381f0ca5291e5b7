"""Many requests, a bounded number of them at the service at a time, and each one's end kept in its place.

Sending waits while enough are open, which bounds the memory here and the user's share there. Who waits for each is a
thread; blocks are packed where they are written, since nnsight keeps its state per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ._connection import Connection, current
from ._errors import ClientError, Misused
from ._progress import Progress, Silent, screen
from ._request import Request, _say

MOST = 64
"""Threads of one batch; services allow more open requests, and a queue needs no more to stay busy."""


class Batch:
    """Requests of one kind, in the order in which their handles were made. Made by `batch()`."""

    def __init__(self, connection: Connection, at_once: int, progress: bool | None) -> None:
        if not 1 <= at_once <= MOST:
            raise Misused(f"at_once is {at_once}; choose 1 to {MOST}.")
        self.requests: list[Request] = []
        self._connection = connection
        self._room = threading.Semaphore(at_once)
        self._stop = threading.Event()
        self._ends: dict[int, dict[str, Any] | BaseException] = {}
        self._threads: list[threading.Thread] = []
        self._progress = connection.choices.progress if progress is None else progress
        self._shown: Any = Silent()

    def submit(self, model: Any = None, *, expected_seconds: float | None = None) -> Request:
        """A handle for the next block, as `edif_hpc.submit()`. Sending it waits while `at_once` requests are open."""
        handle = _Item(self, len(self.requests), model, expected_seconds)
        self.requests.append(handle)
        return handle

    def results(self) -> list[dict[str, Any] | BaseException]:
        """What each block saved, by name, in the order of their handles; waits for all.

        In the place of one that failed stands its error, as RequestFailed; of one that was never used, Misused.
        """
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.2)  # short, so that Ctrl-C is heard
                self._shown.changed()
        unused = Misused("This handle was never the backend of a block.")
        return [self._ends.get(number, unused) for number in range(len(self.requests))]

    def __enter__(self) -> Batch:
        self._shown = screen(self._progress)
        self._shown.start(self._line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.results()
        except BaseException:
            self._leave()
            raise
        else:
            if error is not None:
                self._leave()
        finally:
            self._shown.end(self._line())

    def _leave(self) -> None:
        self._stop.set()
        going = [handle._id for number, handle in enumerate(self.requests) if handle._id and number not in self._ends]
        if going:
            ids = ", ".join(going)
            _say(f"{len(going)} requests go on without you; edif_hpc.get(ID) finds one, its .cancel() ends it: {ids}")

    def _line(self) -> str:
        ended = list(self._ends.values())
        failed = sum(isinstance(end, BaseException) for end in ended)
        text = f"{len(ended)} of {len(self.requests)} requests ended"
        return f"{text}, {failed} of them in an error" if failed else text

    def _sent(self, number: int, send: Callable[[], None]) -> None:
        """Send when there is room, and follow it in a thread."""
        while not self._room.acquire(timeout=0.2):
            self._shown.changed()
        try:
            send()
        except ClientError as error:
            self._ends[number] = error
            self._room.release()
            return
        except BaseException:
            self._room.release()
            raise
        thread = threading.Thread(target=self._follow, args=(number,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, number: int) -> None:
        handle = self.requests[number]
        try:
            self._ends[number] = handle._result(Progress(Silent(), handle.id), None, stop=self._stop)
        except BaseException as error:  # noqa: BLE001 - kept for whoever asks for the results
            self._ends[number] = error
        finally:
            self._room.release()


class _Item(Request):
    """A handle that asks its batch before it is sent."""

    def __init__(self, batch: Batch, number: int, model: Any, expected_seconds: float | None) -> None:
        super().__init__(batch._connection, model=model, expected_seconds=expected_seconds, progress=False)
        self._batch = batch
        self._number = number

    def __call__(self, tracer: Any = None) -> None:
        self._batch._sent(self._number, lambda: super(_Item, self).__call__(tracer))


def batch(at_once: int = 8, *, progress: bool | None = None) -> Batch:
    """Many blocks, at most `at_once` of them waiting or running at the service at a time.

        with edif_hpc.batch(at_once=8) as batch:
            for prompt in prompts:
                with model.trace(prompt, backend=batch.submit()):
                    logits = model.lm_head.output[0, -1].save()
        results = batch.results()

    The end of the `with` waits for all. If it is left by an exception or Ctrl-C, what was sent goes on.

    Args:
        at_once: 1 to 64.
        progress: whether a line is shown; None as `connect` was told.

    Raises:
        NotConnected: no service is known.
    """
    return Batch(current(), at_once, progress)
