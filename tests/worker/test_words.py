"""What messages say: round trips, a stranger's numbers and texts, and how the end of a process is read."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import ResultFormat
from edif_hpc.hardware.interconnect import FABRICS
from edif_hpc.worker import ends, messages
from edif_hpc.worker.channel import ChannelError, decode, encode
from edif_hpc.worker.contract import HostSpec, Limits, RunSpec, Verdict
from edif_hpc.worker.process import clean_environment

pytestmark = pytest.mark.fast
LIMITS = Limits(result_bytes=1000, log_line_bytes=10)


def test_specs_survive_the_way() -> None:
    host = HostSpec("k:{}", Path("/c"), Path("/s"), Isolation.PROCESS, Isolation.NONE, adapters={"a": "/b"})
    assert messages.host_spec(decode(encode(messages.host_spec_message(host)))) == host
    spread = HostSpec("k:{}", Path("/c"), Path("/s"), device="cuda:0", spread={"cuda:0": 2**40, "cuda:1": 1})
    assert messages.host_spec(decode(encode(messages.host_spec_message(spread)))) == spread
    run = RunSpec("r:1", True, {"attn_implementation": None}, LIMITS, ResultFormat.PLANES)
    assert messages.run_spec(decode(encode(messages.run_message(run)))) == run


def test_what_nccl_is_told_reaches_the_model_host_and_no_secret_does() -> None:
    told = {name: value for variables in FABRICS.values() for name, value in variables.items()}
    given = {**told, "CUDA_VISIBLE_DEVICES": "0", "AWS_SECRET_ACCESS_KEY": "secret", "HF_TOKEN": "secret"}
    found = clean_environment(HostSpec("k:{}", Path("/c"), Path("/s")), given)
    assert told.items() <= found.items()
    assert found["CUDA_VISIBLE_DEVICES"] == "0"
    assert "secret" not in found.values()


def test_an_honest_end_survives_the_way() -> None:
    meta = {"runtime": 0.5, "max_memory_usage": 5, "max_mem_by_gpu": {"0": 7}, "max_mem_pct_by_gpu": {}}
    told = messages.Finished(Verdict.COMPLETED, "", 10, meta)
    assert messages.parse_finished(decode(encode(messages.finished_message(told))), LIMITS) == told


def test_a_traceback_of_control_characters_still_fits() -> None:
    told = messages.Finished(Verdict.FAILED, "\x01" * 1_000_000)
    assert len(encode(messages.finished_message(told))) < 128 * 1024


@pytest.mark.parametrize(
    "lie",
    [
        {"verdict": "lost"},
        {"verdict": ["completed"]},
        {"description": None},
        {"size": -1},
        {"size": 1001},
        {"size": True},
        {"size": 1.5},
        {"meta": {"runtime": float("nan")}},
        {"meta": {"runtime": 10**400}},
        {"meta": {"runtime": "1"}},
        {"meta": {"max_mem_by_gpu": {"0": []}}},
    ],
)
def test_lies_are_refused(lie: dict[str, object]) -> None:
    honest = {"type": "finished", "verdict": "completed", "description": "", "size": 1, "meta": {}}
    messages.parse_finished(honest, LIMITS)
    with pytest.raises(ChannelError):
        messages.parse_finished({**honest, **lie}, LIMITS)


def test_only_known_measurements_pass() -> None:
    message = {"verdict": "failed", "description": "", "size": 0, "meta": {"runtime": 1, "secret": "x" * 100}}
    assert "secret" not in messages.parse_finished(message, LIMITS).meta


def test_long_texts_are_cut() -> None:
    assert messages.parse_log({"line": "short"}, LIMITS) == "short"
    assert messages.parse_log({"line": "ä" * 50}, LIMITS) == "äääää…"
    text = "head" + "x" * 100_000 + "tail"
    cut = messages.cut(text)
    assert len(cut) <= messages.DESCRIPTION_CHARS
    assert cut.startswith("head")
    assert cut.endswith("tail")


@pytest.mark.parametrize(
    ("status", "verdict", "word"),
    [
        (signal.SIGSEGV, Verdict.FAILED, "segmentation fault"),
        (signal.SIGABRT | 0x80, Verdict.FAILED, "abort"),
        (signal.SIGSYS, Verdict.FAILED, "forbids"),
        (signal.SIGXCPU, Verdict.FAILED, "CPU"),
        (signal.SIGKILL, Verdict.LOST, "signal 9"),
        (signal.SIGTERM, Verdict.LOST, "signal 15"),
        (0, Verdict.FAILED, "exit code 0"),
        (3 << 8, Verdict.FAILED, "exit code 3"),
    ],
)
def test_how_an_end_is_read(status: int, verdict: Verdict, word: str) -> None:
    read, sentence = ends.explain(status, 5)
    assert read is verdict
    assert word in sentence


@pytest.mark.parametrize(("size", "text"), [(512 * 1024**2, "512 MiB"), (8 * 1024**3, "8 GiB"), (12, "12 bytes")])
def test_sizes_read_well(size: int, text: str) -> None:
    assert ends.size_text(size) == text


def test_an_abort_on_several_ranks_is_ranks_that_strayed() -> None:
    verdict, sentence = ends.explain(signal.SIGABRT, 5, ranks=2)
    assert verdict is Verdict.FAILED
    assert "2 ranks that hold the model did not all do the same" in sentence
    assert "SIGABRT" in ends.explain(signal.SIGABRT, 5)[1]
    assert ends.explain(signal.SIGKILL, 5, ranks=2)[0] is Verdict.LOST
