"""Refusals as HTTP answers: `{"detail": sentence, "code": code}`, which the stock client shows to its user."""

from __future__ import annotations

from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.responses import JSONResponse

from edif_hpc.core.errors import EdifError, Unavailable

RETRY_AFTER_SECONDS = 2
REFUSING = (BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisConnectionError, RedisTimeoutError, OSError)
FULL = ("OOM ", "MISCONF ", "LOADING ", "READONLY ")
"""How Redis begins to say, also from inside a script, that it takes no writes now."""


class NotFound(EdifError):
    code = "not_found"
    http_status = 404


def unavailable(error: RedisError | OSError) -> EdifError:
    """Redis is away or takes no writes: try again. Another complaint of Redis is a fault of ours, and is raised."""
    if isinstance(error, ResponseError) and any(word in str(error)[:200] for word in FULL):
        return Unavailable("The service's Redis takes no requests at the moment (full or loading); try again.")
    if isinstance(error, REFUSING):
        return Unavailable("The service cannot reach its Redis at the moment; try again in a few seconds.")
    raise error


def json_error(error: EdifError) -> JSONResponse:
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if error.http_status == Unavailable.http_status else None
    return JSONResponse({"detail": str(error), "code": error.code}, error.http_status, headers)
