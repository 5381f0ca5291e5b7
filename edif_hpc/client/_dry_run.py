"""A block run here, on the model's shapes alone: what it would save, how large that is, and whether it runs at all.

It goes the way a real request goes, packed and unpacked, so that the user's own lists are not touched, and a value
that cannot travel is found out. Tensors carry shape and dtype and no numbers (torch's FakeTensorMode, as in nnsight's
`scan`), so a block that decides by numbers, as `generate` and `.item()` do, ends where it does so. The service is not
asked.
"""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._errors import DryRunStopped, Misused
from ._progress import size

KINDS = 3
"""Of tensors in one container that a line names."""


@dataclass(frozen=True)
class Saved:
    """One saved value.

    Args:
        type: its class, as `Tensor`.
        shape: of a tensor; () for everything else.
        dtype: of a tensor, as `float32`; "" for everything else.
        bytes: what the tensors in it take. The service compacts views, and compression may make it less.
        tensors: those inside a container, in order.
    """

    type: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    tensors: tuple[Saved, ...] = ()


class DryRun:
    """What a block would do. Made by `dry_run()`; after the block, read its attributes or print it.

    Attributes:
        saved: what it would save, by name.
        bytes: what all of that takes.
        payload_bytes: what would be sent.
        stopped: why it went no further, where only a real run can decide; "" when it ran to its end.
    """

    def __init__(self, model: Any = None) -> None:
        self._model = model
        self.saved: dict[str, Saved] = {}
        self.payload_bytes = 0
        self.stopped = ""
        self.ran = False

    @property
    def bytes(self) -> int:
        return sum(saved.bytes for saved in self.saved.values())

    def __repr__(self) -> str:
        return str(self)  # a notebook shows it

    def __str__(self) -> str:
        if not self.ran:
            return "A dry run that has had no block yet."
        rows = [f"{name:<20} {_shown(saved):<36} {size(saved.bytes):>10}" for name, saved in self.saved.items()]
        rows.append(f"{'in all':<57} {size(self.bytes):>10}")
        if self.stopped:
            rows.append(self.stopped)
        return "\n".join(rows)

    def check(self) -> DryRun:
        """Itself, if the block ran to its end.

        Raises:
            DryRunStopped: it did not.
        """
        if self.stopped:
            raise DryRunStopped(self.stopped)
        return self

    def __call__(self, tracer: Any = None) -> None:
        """Run a block; nnsight calls this at the end of `with model.trace(..., backend=report)`."""
        if tracer is None:
            raise Misused('A dry run takes a block: with model.trace("...", backend=edif_hpc.dry_run()): ...')
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.tracer import _saves

        from . import _sending
        from ._sending import model_of

        model = self._model or model_of(tracer)
        packed = _sending.pack(tracer, model)
        self.payload_bytes, self.ran = len(packed.blob), True
        names: dict[str, Any] = {}
        with _kept_sources(tracer.info.frame.f_code.co_filename):
            copy = RequestModel.deserialize(packed.blob, model._remoteable_persistent_objects(), packed.compress)
            try:
                names = self._run(copy)
            finally:
                model.interleaver.cancel()
                saves = _saves()
                self.saved = {name: _described(value) for name, value in names.items() if id(value) in saves}

    def _run(self, copy: Any) -> dict[str, Any]:
        """Run the block; returns the names that it bound."""
        from torch._subclasses.fake_tensor import (
            DataDependentOutputException,
            DynamicOutputShapeException,
            FakeTensorMode,
        )
        from torch._subclasses.fake_tensor import UnsupportedFakeTensorException as Unsupported
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

        undecided = (
            DataDependentOutputException,
            DynamicOutputShapeException,
            GuardOnDataDependentSymNode,
            Unsupported,
        )
        with (
            _without_words_of("torch._subclasses.fake_tensor"),  # the error itself comes to the user
            FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(assume_static_by_default=True)),
        ):
            try:
                copy.execute(copy.info.code)
            except undecided as error:
                stack = _own_frames(error)
                where = f"line {stack[-1].tb_lineno}" if stack else "the model itself"
                self.stopped = (
                    f"It went as far as {where}, which decides by numbers, and a dry run has none: what comes "
                    "after only a real run can tell."
                )
                # The block's names so far, which nnsight hands to the frame at the block's end alone.
                return {name: value for entry in stack for name, value in entry.tb_frame.f_locals.items()}
        return dict(copy.info.frame.f_locals)


def dry_run(model: Any = None) -> DryRun:
    """A report in the place of a service: `with model.trace("...", backend=report): …` runs the block on shapes alone.

        report = edif_hpc.dry_run()
        with model.trace("The Eiffel Tower is in", backend=report):
            logits = model.lm_head.output.save()
        print(report)

    The block's variables stay unset.

    Args:
        model: only for a `session` of a model that is no plain name.
    """
    return DryRun(model)


def _described(value: Any) -> Saved:
    import torch

    if isinstance(value, torch.Tensor):
        return Saved(
            type(value).__name__.replace("FakeTensor", "Tensor"), tuple(value.shape), _dtype(value), _bytes(value)
        )
    inside = tuple(_described(tensor) for tensor in _tensors(value, set()))
    return Saved(type(value).__name__, (), "", sum(tensor.bytes for tensor in inside), inside)


def _tensors(value: Any, seen: set[int]) -> Iterator[Any]:
    import torch

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inner = list(value)
    elif hasattr(value, "__dict__") and not callable(value):
        inner = [found for name, found in vars(value).items() if name not in ("model", "_envoy")]  # a cache's way back
    for one in inner:
        yield from _tensors(one, seen)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shown(saved: Saved) -> str:
    if saved.dtype:
        return f"{saved.dtype} {' x '.join(str(length) for length in saved.shape) or 'number'}"
    kinds = Counter(_shown(tensor) for tensor in saved.tensors)
    inside = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(KINDS))
    return f"{saved.type}{': ' if inside else ''}{inside}{', …' if len(kinds) > KINDS else ''}"


def _own_frames(error: BaseException) -> list[Any]:
    """The entries of an error's traceback that are the user's own."""
    trace, found = getattr(error, "__intervention_tb__", error.__traceback__), []
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "site-packages" not in name and not name.startswith(os.path.dirname(__file__)):
            found.append(trace)
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def _without_words_of(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _kept_sources(filename: str) -> Iterator[None]:
    """Unpacking a block puts its text in the place of the user's file, where nnsight finds the blocks inside it."""
    from nnsight.tracing.globals import BLOCKS, SOURCES

    caches: tuple[Any, ...] = (linecache.cache, SOURCES, BLOCKS)
    kept = [dict(live) for live in caches]
    SOURCES.pop(filename, None)
    BLOCKS.clear()
    try:
        yield
    finally:
        for live, before in zip(caches, kept, strict=True):
            live.clear()
            live.update(before)
