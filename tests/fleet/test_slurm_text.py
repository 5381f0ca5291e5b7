"""Slurm's words as a real Slurm 22.05 printed them; `python -m tests.cluster.capture` wrote them down."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from edif_hpc.core import walltime
from edif_hpc.fleet.slurm import names
from edif_hpc.fleet.slurm.text import (
    TIME_LIMIT,
    Phase,
    Unreadable,
    first_error,
    is_refusal,
    parse_squeue,
    parse_submitted,
)

pytestmark = pytest.mark.fast

CAPTURED = Path(__file__).parent / "captured" / "slurm-22.05"
HOME = Path("/home/ann/.edif-hpc")
DEADLINE, WARNING = 10_000.0, 90.0


def captured(name: str) -> str:
    """A command's output, without the line that says where it is from."""
    return (CAPTURED / f"{name}.txt").read_text().split("\n", 1)[1]


def test_a_listing_of_everything() -> None:
    found = {seen.job_id: seen for seen in parse_squeue(captured("squeue"))}
    running, pending, held, array = found["11"], found["12"], found["14"], found["16_[1-3%1]"]
    assert (running.phase, running.name, running.nodes) == (Phase.RUNNING, "edif helma|1", "node[1-2]")
    assert running.start is not None
    assert running.end == running.start + 30 * 60
    assert (pending.phase, pending.reason) == (Phase.PENDING, "None")
    assert pending.start is not None
    assert (held.reason, held.start, held.end) == ("JobHeldUser", None, None)
    assert array.phase is Phase.PENDING
    assert found["17"].phase is Phase.ENDING
    assert {found[each].phase for each in ("1", "4")} == {Phase.ENDED}


def test_nothing_at_all_is_an_answer() -> None:
    assert parse_squeue(captured("squeue-nobodys")) == []


@pytest.mark.parametrize(
    "line",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "11|RUNNING|None|2026-11-24T04:52:14",
        "11|dreaming|None|N/A|N/A||edif",
        "11|RUNNING|None|yesterday|N/A||edif",
        "eleven|RUNNING|None|N/A|N/A||edif",
    ],
)
def test_one_line_that_cannot_be_read_makes_all_unknown(line: str) -> None:
    with pytest.raises(Unreadable):
        parse_squeue(captured("squeue") + line + "\n")


def test_what_is_not_ours_need_not_be_understood() -> None:
    others = "5|PENDING|None|soon|N/A||edif-notes\n123+0|LAUNCHING|None|tomorrow|N/A||het\nx|?|None|N/A|N/A||1\n"
    ours = (
        "7|EXPEDITING|None|N/A|N/A||edif-3f2a91-helma-7c0d12-g4\n8|ASLEEP|None|N/A|N/A||edif-3f2a91-helma-7c0d12-g5\n"
    )
    found = parse_squeue(others + ours, names.is_one)
    assert [(seen.job_id, seen.phase) for seen in found] == [("7", Phase.PENDING), ("8", Phase.RUNNING)]
    with pytest.raises(Unreadable):
        parse_squeue(others + "slurm_load_jobs error: Unexpected message received\n" + ours, names.is_one)


@pytest.mark.parametrize("name", ["sbatch-invalid-partition", "sbatch-account", "sbatch-unknown-option"])
def test_what_slurm_refused_does_not_exist(name: str) -> None:
    assert is_refusal(captured(name), 1)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("", 1),
        ("Could not make sense of sbatch output", 0),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying.", TIME_LIMIT),
        # As in Slurm's source, src/common/slurm_errno.c, behind what sbatch prints before it.
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 1),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", 1),
        ("sbatch: error: Batch job submission failed: Message receive failure", 1),
        ("sbatch: error: Batch job submission failed: Connection reset by peer", 1),
    ],
)
def test_what_slurm_did_not_answer_may_exist(said: str, status: int) -> None:
    assert not is_refusal(said, status)


def test_the_id_of_what_was_submitted() -> None:
    assert parse_submitted(captured("sbatch-accepted")) == "1"
    assert parse_submitted(captured("sbatch-accepted-not-parsable")) == "10"
    assert parse_submitted("77;helma\n") == "77"
    with pytest.raises(Unreadable):
        parse_submitted("")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sbatch-too-long", "Requested time limit is invalid"),
        ("sbatch-invalid-partition", "invalid partition specified: nowhere; Batch job submission failed"),
        ("sbatch-too-many-gpus", "Requested node configuration is not available"),
        ("sbatch-unknown-option", "unrecognized option"),
        ("squeue-unknown-job", "Invalid job id specified"),
    ],
)
def test_a_refusal_keeps_slurms_words(name: str, sentence: str) -> None:
    assert sentence in first_error(captured(name))
    assert not first_error(captured(name)).startswith("sbatch")


def test_a_name_is_read_back_and_only_by_its_home() -> None:
    name = names.first(HOME, "helma-a100").next
    assert names.read(name.allocation, HOME) == name
    assert name.generation == 2
    assert names.read(name.allocation, Path("/home/bob/.edif-hpc")) is None
    assert names.read("interactive", HOME) is None


# -- the walltime ------------------------------------------------------------------------------------------------------


def test_the_end_that_slurm_tells_a_job() -> None:
    at = str(int(datetime(2026, 11, 24).timestamp()))
    assert walltime.from_environment({"SLURM_JOB_END_TIME": at}) == float(at)
    assert walltime.from_environment({}) is None
    assert walltime.from_environment({"SLURM_JOB_END_TIME": "0"}) is None


@pytest.mark.parametrize(
    ("signalled", "expected"),
    [
        (DEADLINE - WARNING - 59, DEADLINE - WARNING),  # the warning, early
        (DEADLINE - WARNING, DEADLINE - WARNING),  # the warning, in time
        (DEADLINE - 10, DEADLINE - 10),  # late: at once
        (DEADLINE - 5000, DEADLINE - 5000),  # somebody's wish: at once
    ],
)
def test_a_signal_near_the_end_leaves_the_moment_to_the_clock(signalled: float, expected: float) -> None:
    assert walltime.drain_at(signalled, DEADLINE, WARNING) == expected


@pytest.mark.parametrize("seconds", [120, 3600, 86400])
def test_margins_leave_most_of_any_walltime(seconds: int) -> None:
    assert walltime.flush_seconds(seconds) < walltime.warning_seconds(seconds) <= seconds / 10
