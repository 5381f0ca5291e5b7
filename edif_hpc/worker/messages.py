"""What the messages of a channel say, and the checks on those that a stranger may have written. No torch here.

    agent -> host            spec | run | skip | verify | lend
    host -> agent            progress | ready (+ zygote channel, pidfd, weights, unless `none`) | failed
                             | lent (+ memfd, manifest), at level `none`
    host -> zygote           weights (+ memfd, manifest)
    zygote -> host           ready | failed
    agent -> zygote          fork (+ what other hosts lend, for one made to order)
    zygote -> agent          spare (+ pidfd, executor channel) | exit
    executor -> agent        prepared | broken
    agent -> executor, host  run (+ payload, result, output of a script)
    executor, host -> agent  started | log | finished
    host -> rank             spec | run (+ payload) | check
    rank -> host             joining | ready | failed | ran | checked

An executor's messages are a stranger's word: unknown fields are dropped, numbers must be finite, texts are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import Kind, ResultFormat
from edif_hpc.worker.channel import ChannelError, Message
from edif_hpc.worker.contract import HostSpec, Limits, RunSpec, Verdict

DESCRIPTION_CHARS = 16_000
"""A traceback longer than this loses its middle; escaped as JSON it still fits one message."""
MAX_GPUS = 64
LARGEST = 2**63


@dataclass(frozen=True)
class Finished:
    """The end of a run as the process that ran it tells it."""

    verdict: Verdict
    description: str = ""
    size: int = 0
    meta: dict[str, Any] = field(default_factory=dict)


def host_spec_message(spec: HostSpec) -> Message:
    return {"type": "spec", **asdict(spec), "cache": str(spec.cache), "scratch": str(spec.scratch)}


def host_spec(message: Message) -> HostSpec:
    fields = {key: value for key, value in message.items() if key != "type"}
    fields |= {key: Path(fields[key]) for key in ("cache", "scratch")}
    fields |= {key: Isolation(fields[key]) for key in ("isolation", "required")}
    return HostSpec(**fields)


def run_message(spec: RunSpec) -> Message:
    return {"type": "run", **asdict(spec)}


def run_spec(message: Message) -> RunSpec:
    apart = ("type", "limits", "format", "kind", "companions")
    fields = {key: value for key, value in message.items() if key not in apart}
    fields |= {"format": ResultFormat(message["format"]), "kind": Kind(message["kind"])}
    return RunSpec(**fields, limits=Limits(**message["limits"]))


def finished_message(finished: Finished) -> Message:
    return {
        "type": "finished",
        "verdict": finished.verdict.value,
        "description": cut(finished.description),
        "size": finished.size,
        "meta": finished.meta,
    }


def parse_finished(message: Message, limits: Limits) -> Finished:
    """Check what an executor said about its end; ChannelError when it makes no sense."""
    verdict, description, size = message.get("verdict"), message.get("description"), message.get("size")
    if verdict not in (Verdict.COMPLETED, Verdict.FAILED) or not isinstance(description, str):
        raise ChannelError("an executor ended its request in a way that it may not")
    if type(size) is not int or not 0 <= size <= limits.result_bytes:
        raise ChannelError("an executor named an impossible result size")
    return Finished(Verdict(verdict), cut(plain(description)), size, _checked_meta(message.get("meta")))


def parse_log(message: Message, limits: Limits) -> str:
    line = message.get("line")
    if not isinstance(line, str):
        raise ChannelError("an executor sent a log line that is no text")
    return cut_line(plain(line), limits.log_line_bytes)


def plain(text: str) -> str:
    """A text that can be written as UTF-8: JSON can spell half of a surrogate pair, which Redis would refuse."""
    return text.encode("utf-8", "replace").decode()


def cut(text: str, limit: int = DESCRIPTION_CHARS) -> str:
    """Keep the head and the tail of a text that is too long: a traceback says most at its end."""
    if len(text) <= limit:
        return text
    note = "\n... (cut) ...\n"
    head = limit // 4
    return text[:head] + note + text[-(limit - head - len(note)) :]


def cut_line(line: str, limit_bytes: int) -> str:
    if len(line) * 4 <= limit_bytes:
        return line
    data = line.encode("utf-8", "replace")
    return line if len(data) <= limit_bytes else data[:limit_bytes].decode("utf-8", "ignore") + "…"


def _checked_meta(meta: object) -> dict[str, Any]:
    given: Mapping[Any, Any] = meta if isinstance(meta, dict) else {}
    checked: dict[str, Any] = {key: _number(given.get(key, 0)) for key in ("runtime", "max_memory_usage")}
    for key in ("max_mem_by_gpu", "max_mem_pct_by_gpu", "alloc_shortfall_by_gpu"):
        by_gpu = given.get(key)
        if isinstance(by_gpu, dict) and len(by_gpu) <= MAX_GPUS:
            checked[key] = {plain(str(gpu))[:8]: _number(value) for gpu, value in by_gpu.items()}
        elif key != "alloc_shortfall_by_gpu":
            checked[key] = {}
    if given.get("own_file") is True:
        checked["own_file"] = True
    return checked


def _number(value: object) -> int | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST:
        return value
    raise ChannelError("an executor reported a measurement that is no number")
