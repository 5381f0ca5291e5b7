"""Run one request against a model in this process: the block, what it saved, and what it cost.

The same code serves all levels: an executor calls it once, a host at level `none` for every request. What it must not
know: sockets, and who asked. See "Running a request" in the project's notes on nnsight's wire; the order matters.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from nnsight.schema.request import RequestModel
from nnsight.tracing import globals as nnsight_globals
from nnsight.tracing.tracer import _saves, dec, inc

from edif_hpc.core.wire import Kind
from edif_hpc.worker import here, payloads, results, script
from edif_hpc.worker.contract import RunSpec, Verdict
from edif_hpc.worker.ends import memory_limit_sentence
from edif_hpc.worker.failures import Refusal, describe, is_out_of_memory
from edif_hpc.worker.measure import Meter
from edif_hpc.worker.messages import Finished
from edif_hpc.worker.prints import LineWriter


class Runner:
    """Runs requests on one model, one after the other.

    Args:
        model: an nnsight model with weights.
        key: what requests call it.
        devices: where it lives; inputs arrive on the first.
        adapters: PEFT adapter ids that may be named in a request's `env`, with the directory each lives in.
    """

    def __init__(
        self, model: Any, key: str, devices: tuple[str, ...], adapters: dict[str, str], threads: int = 1
    ) -> None:
        self.model = model
        self.key = key
        self.others: dict[str, Any] = {}
        """Further models that a script may use, by key."""
        self.sealed: dict[str, tuple[int, ...]] = {}
        """Descriptors of the untouched weights of those that have them, by key."""
        self._devices = tuple(torch.device(device) for device in devices)
        self.device = self._devices[0]
        self._adapters = adapters
        self._threads = threads
        self._attention = model.attn_implementation
        self._objects: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Do ahead of a request what needs none."""
        self._objects = self.model._remoteable_persistent_objects()

    def run(
        self, spec: RunSpec, payload_fd: int, result_fd: int, log: Callable[[str], None], output_fd: int = -1
    ) -> Finished:
        """Run one request; its result, if any, lies in `result_fd`. Everything its code does wrong is an answer.

        Args:
            output_fd: of a script, the file that it may write to.
        """
        meter, own_file = Meter(self._devices), False
        printed = LineWriter(log, spec.limits.log_lines, spec.limits.log_line_bytes)
        with _restored_caches(), contextlib.redirect_stdout(printed):
            try:
                if spec.kind is Kind.SCRIPT:
                    size, own_file = self._answer_script(spec, payload_fd, result_fd, output_fd)
                else:
                    size = self._answer(spec, payload_fd, result_fd)
                finished = Finished(Verdict.COMPLETED, size=size)
            except Refusal as refusal:
                finished = Finished(Verdict.FAILED, str(refusal))
            except BaseException as error:  # noqa: BLE001 - whatever the block raises, SystemExit included, is the user's
                finished = self._failed(spec, error, meter)
            finally:
                self._tidy()
            printed.finish()
        meta = {**meter.meta(), **({"own_file": True} if own_file else {})}
        return Finished(finished.verdict, finished.description, finished.size, meta)

    def _answer(self, spec: RunSpec, payload_fd: int, result_fd: int) -> int:
        blob = payloads.read(payload_fd, spec.compress, spec.limits.payload_bytes)
        self._apply(self.model, spec.env)
        tracer = self._rebuild(blob)
        del blob
        saved = self._execute(tracer)
        del tracer
        return results.write(saved, result_fd, spec.format, spec.limits.result_bytes, self._threads)

    def _answer_script(self, spec: RunSpec, payload_fd: int, result_fd: int, output_fd: int) -> tuple[int, bool]:
        asked = script.unpacked(payloads.read(payload_fd, False, spec.limits.payload_bytes))
        attention = {key: model.attn_implementation for key, model in self.others.items()}
        models = here.Models(
            {self.key: self.model, **self.others}, self._apply, self.sealed, {**attention, self.key: self._attention}
        )
        result = script.Result(spec.form, output_fd)
        script.run(asked, models, result)
        return result.write(result_fd, spec.limits.result_bytes, self._threads), result.own_file

    def _apply(self, model: Any, env: dict[str, Any]) -> None:
        wanted = checked_env(env, self._adapters)
        if model is self.model:
            wanted.setdefault("attn_implementation", self._attention)
        if wanted.get("peft") != model.peft:
            self._objects = None  # the adapter changes the module tree
        try:
            model._remoteable_set_env(wanted)
        except (ValueError, ImportError) as error:
            raise Refusal(f"The environment that the request asks for cannot be had here: {error}") from error

    def _rebuild(self, blob: bytes) -> Any:
        objects = self._objects or self.model._remoteable_persistent_objects()
        self._objects = objects
        try:
            return RequestModel.deserialize(blob, objects, compress=False)
        except MemoryError:
            raise
        except Exception as error:
            raise payloads.refusal(error) from error

    def _execute(self, tracer: Any) -> dict[str, Any]:
        inc()
        try:
            with self._precision():
                tracer.execute(tracer.info.code)
            saves = _saves()
            return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saves}
        finally:
            dec()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast on half-precision accelerators; its cache would hide optimizer steps inside one session."""
        dtype = next((p.dtype for p in self.model._module.parameters() if p.is_floating_point()), torch.float32)
        if self.device.type == "cpu" or dtype not in (torch.float16, torch.bfloat16):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    def _failed(self, spec: RunSpec, error: BaseException, meter: Meter) -> Finished:
        if is_out_of_memory(error):
            meter.out_of_memory(error)
            if self.device.type == "cpu":
                return Finished(Verdict.FAILED, memory_limit_sentence(spec.limits.memory_bytes))
        return Finished(Verdict.FAILED, describe(error, script=spec.kind is Kind.SCRIPT))

    def _tidy(self) -> None:
        self.model.interleaver.cancel()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _restored_caches() -> Iterator[None]:
    """Forget what this request taught nnsight and linecache: a later one from the same file and line is another."""
    kept = [dict(linecache.cache), dict(nnsight_globals.SOURCES), dict(nnsight_globals.BLOCKS)]
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), sys.gettrace()
    try:
        yield
    finally:
        for live, before in zip((linecache.cache, nnsight_globals.SOURCES, nnsight_globals.BLOCKS), kept, strict=True):
            live.clear()
            live.update(before)
        torch.set_grad_enabled(modes[0])
        torch.set_default_dtype(modes[1])
        sys.settrace(modes[2])


def checked_env(env: dict[str, Any], adapters: dict[str, str]) -> dict[str, Any]:
    """The request's `env` with its adapter's directory for its id.

    Raises:
        Refusal: it names something that is not allowed, or is not what a client sends.
    """
    unknown = sorted(set(env) - {"attn_implementation", "peft"})
    if unknown:
        raise Refusal(f"The request's env has a field {unknown[0]!r} that this service does not know: update nnsight.")
    wanted = {key: value for key, value in env.items() if value is not None}
    for key, value in wanted.items():
        if not isinstance(value, str) or not value:
            raise Refusal(f"The request's env field {key!r} must be a name; update nnsight.")
    attention = wanted.get("attn_implementation", "")
    if "/" in attention:
        raise Refusal(f"Attention kernels from the Hub ({attention[:100]!r}) are not served: use 'sdpa' or 'eager'.")
    if "peft" in wanted:
        if wanted["peft"] not in adapters:
            allowed = ", ".join(sorted(adapters)) or "none"
            raise Refusal(
                f"The adapter {wanted['peft'][:200]!r} may not be used here (allowed: {allowed}): "
                "ask the administrator to add it."
            )
        wanted["peft"] = adapters[wanted["peft"]]
    return wanted
