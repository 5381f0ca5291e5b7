"""From a captured block to a request that the service has: packed as nnsight packs it, posted so that it exists once.

This is where the client meets nnsight's inside; everything used of it is named in the imports. What it must not know:
what becomes of the request.
"""

from __future__ import annotations

import ast
import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import pull_env
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import Tracer, save
from nnsight.tracing.util import push

from . import _formats, _surprises
from ._connection import Connection, Trouble
from ._errors import Misused

EXPECTED_HEADER = "edif-expected-seconds"


@dataclass(frozen=True)
class Packed:
    """A block ready to be sent. It no longer needs the frame that it was written in."""

    model_key: str
    env: dict[str, Any]
    compress: bool
    blob: bytes


def pack(tracer: Tracer, model: Any = None) -> Packed:
    """Pack a captured block, after saying what is surprising about it.

    Args:
        model: the model it runs on; found by itself but in a session whose model is no plain name.

    Raises:
        Misused: the model cannot be found, or an earlier block's tracer is used.
    """
    model = model_of(tracer) if model is None else model
    _surprises.refuse_dead_tracers(tracer)
    _surprises.warn(tracer)
    pull_env()
    compress = bool(CONFIG.API.COMPRESS)
    with _surprises.without_dead_tracers(tracer):
        blob = RequestModel.serialize(tracer, compress)
    return Packed(model.to_model_key(), model._remoteable_get_env(), compress, blob)


def post(
    connection: Connection, packed: Packed, idempotency_key: str, expected_seconds: float | None, trouble: Trouble
) -> str:
    """Submit it; returns the request's id. With the same key it may be called again, and comes to the same request.

    Raises:
        Refused: the service does not take it.
        Unreachable: it stayed away; whether the request is there, `requests()` tells.
    """
    envelope = {"model_key": packed.model_key, "session_id": "", "compress": packed.compress, "env": packed.env}
    headers = {
        "idempotency-key": idempotency_key,
        "nnsight-version": version("nnsight"),
        "python-version": sys.version,
        "ndif-timestamp": repr(time.time()),
        **_formats.wanted(),
        **({EXPECTED_HEADER: repr(float(expected_seconds))} if expected_seconds is not None else {}),
    }
    answer = connection.post(
        "/request",
        trouble=trouble,
        data={"data": json.dumps(envelope)},
        files={"blob": ("request", packed.blob, "application/octet-stream")},
        headers=headers,
    )
    return str(answer["id"])


def deliver(tracer: Tracer, values: dict[str, Any]) -> None:
    """Put saved values into the variables of the block, as a local run would."""
    for value in values.values():
        save(value)
    if tracer.info is not None and tracer.info.frame is not None:
        push(tracer.info.frame, values)


def model_of(tracer: Tracer) -> Any:
    """The model that a block runs on.

    A trace knows it. A session does not: it is looked up by the name that stands before `.session(` in the user's
    `with`.

    Raises:
        Misused: what stands there is more than names and attributes.
    """
    found = getattr(tracer, "envoy", None)
    if found is None:
        calls = [item.context_expr for item in tracer.node.items if isinstance(item.context_expr, ast.Call)]
        models = [value for call in calls if isinstance(value := _value(call.func, tracer), Remotable)]
        found = models[0] if len(models) == 1 else None
    if not isinstance(found, Remotable):
        raise Misused("The model of this block cannot be told; name it: edif_hpc.submit(model), or use remote=True.")
    return found


def _value(called: ast.expr, tracer: Tracer) -> Any:
    """What `NAME.NAME.session` is a method of; None for anything that would have to be run to be known."""
    names = []
    expression = called.value if isinstance(called, ast.Attribute) else None
    while isinstance(expression, ast.Attribute):
        names.append(expression.attr)
        expression = expression.value
    if not isinstance(expression, ast.Name):
        return None
    frame = tracer.info.frame
    value = frame.f_locals.get(expression.id, frame.f_globals.get(expression.id))
    for name in reversed(names):
        value = getattr(value, name, None)
    return value
