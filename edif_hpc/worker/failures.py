"""What a user is told when their block fails: their own traceback, or one sentence when it was a limit.

nnsight runs the block deep inside the model; its frames and ours say nothing to the user and are taken out.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from types import TracebackType

import nnsight
import torch
from nnsight.tracing.util import filter_traceback

import edif_hpc
from edif_hpc.worker.messages import cut

HIDDEN = tuple(os.path.dirname(os.path.abspath(str(package.__file__))) + os.sep for package in (edif_hpc, nnsight))
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "can't start new thread")


class Refusal(Exception):
    """The request cannot be run or answered, and it is not the block that failed; `str` is the sentence."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the block's own class, which may do anything when asked for its text
        return False
    return any(sign in text for sign in OUT_OF_MEMORY)


def describe(error: BaseException, *, script: bool = False) -> str:
    """The traceback as the user would have seen it locally, or a sentence when their exception cannot be shown.

    Args:
        script: the user's code is what called nnsight, and not only the block inside: both are shown.
    """
    try:
        _clean(error, set(), script)
        return cut("".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip())
    except Exception as trouble:  # noqa: BLE001 - see above
        return (
            f"The block raised a {type.__getattribute__(type(error), '__name__')}, which could not be shown "
            f"({type.__getattribute__(type(trouble), '__name__')}): raise an ordinary exception to see more."
        )


def _clean(error: BaseException | None, seen: set[int], script: bool) -> None:
    """Take the hidden frames out of an exception and of those it came from."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    own = getattr(error, "__intervention_tb__", None)
    block = _users_frames(own) if isinstance(own, TracebackType) else None
    if block is None:
        error.__traceback__ = _users_frames(error.__traceback__)
    else:
        error.__traceback__ = _led_to(error.__traceback__, block) if script else block
    _clean(error.__cause__, seen, script)
    _clean(error.__context__, seen, script)
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            _clean(inner, seen, script)


def _led_to(tb: TracebackType | None, block: TracebackType) -> TracebackType:
    """The user's frames that led to nnsight, then those of the block that it ran deep inside the model."""
    calls = []
    for each in _each(tb):
        file = each.tb_frame.f_code.co_filename
        if file.startswith(HIDDEN[1]):
            break
        if not file.startswith(HIDDEN[0]):
            calls.append(each)
    whole = block
    for each in reversed(calls):
        whole = TracebackType(whole, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return whole


def _each(tb: TracebackType | None) -> Iterator[TracebackType]:
    while tb is not None:
        yield tb
        tb = tb.tb_next


def _users_frames(tb: TracebackType | None) -> TracebackType | None:
    kept: TracebackType | None = filter_traceback(tb, lambda frame: not frame.f_code.co_filename.startswith(HIDDEN))
    return kept
