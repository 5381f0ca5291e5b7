"""Refusals as HTTP answers: `{"detail": sentence, "code": code}`, which the stock client shows to its user."""

from __future__ import annotations

from redis.exceptions import BusyLoadingError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.responses import JSONResponse

from edif_hpc.core.errors import EdifError, Unavailable

RETRY_AFTER_SECONDS = 2
FULL = (BusyLoadingError, ReadOnlyError)
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)


class NotFound(EdifError):
    code = "not_found"
    http_status = 404


def unavailable(error: RedisError | OSError) -> EdifError:
    """Redis is away or takes no writes: try again. Another complaint of Redis is a fault of ours, and is raised."""
    if isinstance(error, FULL):
        return Unavailable("The service's Redis takes no requests at the moment (full or loading); try again.")
    if isinstance(error, AWAY):
        return Unavailable("The service cannot reach its Redis at the moment; try again in a few seconds.")
    raise error


def json_error(error: EdifError) -> JSONResponse:
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if error.http_status == Unavailable.http_status else None
    return JSONResponse({"detail": str(error), "code": error.code}, error.http_status, headers)
