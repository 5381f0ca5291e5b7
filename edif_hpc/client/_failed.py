"""A request that ended in ERROR. Apart from the other errors, since it is nnsight's RemoteError too and imports it."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.backends.remote import RemoteError

from ._errors import ClientError


class RequestFailed(RemoteError, ClientError):  # type: ignore[misc]  # nnsight carries no types
    """The request ended in ERROR.

    `str(error)` is the user's own traceback, or one sentence where the service ended it.

    Args:
        text: that.
        request_id: which request.
        meta: what the run cost, as `runtime` in seconds; None when it never ran.
    """

    code = "failed"

    def __init__(self, text: str, request_id: str = "", meta: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.request_id = request_id
        self.meta = meta
        if request_id:
            self.add_note(f"Request {request_id}: `edif-hpc requests show {request_id}` tells what happened to it.")
