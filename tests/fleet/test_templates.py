"""The sbatch templates, run by bash as Slurm would, with executables on PATH in the place of Slurm and Apptainer.

The worker in these tests is a script: it asks its supervisor for what a real one would, and writes down the answers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.servers import eventually

pytestmark = pytest.mark.fast

SLURM = Path(__file__).parents[2] / "slurm"
TEMPLATES = sorted(SLURM.glob("worker-*.sbatch"))
END_SECONDS = 30.0
APPTAINER = """#!/bin/bash
printf '%s\\n' "$@" > {folder}/command
line=$(printf '%s\\n' "$@" | sed -n 's/^\\(.*\\):\\/tmp$/\\1/p')/supervisor
exec 5<> "$line/asks" 6<> "$line/answers"
trap 'echo TERM >> {folder}/signals; exit 0' TERM
trap 'echo USR2 >> {folder}/signals' USR2
while read -r ask; do
    echo "$ask" >&5
    read -r -t 20 answer <&6
    echo "$answer" >> {folder}/answers
done < {folder}/asks
echo >> {folder}/served
while [ -e {folder}/stay ]; do sleep 0.05; done
exit "$(cat {folder}/status 2> /dev/null || echo 0)"
"""
SQUEUE = """#!/bin/bash
case "$*" in *%e*) date -d '+1 hour' +%FT%T; exit ;; esac
[ ! -e {folder}/silent ] || {{ echo "slurm_load_jobs error" >&2; exit 1; }}
cat {folder}/queue
"""
SBATCH = """#!/bin/bash
[ ! -e {folder}/refuse ] || {{ echo "sbatch: error: Invalid account" >&2; exit 1; }}
echo "$*" >> {folder}/submitted
env | grep -E '^(SLURM|SBATCH)_' > {folder}/leaked
name=$(printf '%s\\n' "$@" | sed -n 's/^--job-name=//p')
echo "78 PENDING $name" >> {folder}/queue
echo "78;cluster"
"""
SCANCEL = """#!/bin/bash
echo "$*" >> {folder}/cancelled
"""
SCONTROL = """#!/bin/bash
echo "$*" >> {folder}/scontrol
echo "JobId=77 JobName=x Command={folder}/worker.sbatch WorkDir=/"
"""


@dataclass
class Place:
    """One allocation of a template, `asks` being what its worker asks for, a line each."""

    folder: Path
    home: Path

    @property
    def name(self) -> str:
        tag = hashlib.sha256(str(self.home).encode()).hexdigest()[:6]
        return f"edif-{tag}-cpu-7c0d12"

    def start(self, *asks: str, name: str = "", **variables: str) -> subprocess.Popen[str]:
        text = (SLURM / "worker-cpu.sbatch").read_text()
        text = text.replace("/SHARED/edif-home", str(self.home)).replace("/SHARED/edif_hpc/slurm", str(SLURM))
        values = {"IMAGE": str(self.folder / "image.sif"), "CACHE": str(self.folder), "LEAST_UPTIME": "0", **variables}
        for key, value in values.items():
            text = re.sub(rf"^(    {key}=).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        (self.folder / "worker.sbatch").write_text(text)
        (self.folder / "asks").write_text("".join(f"{ask}\n" for ask in asks))
        environment = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"), "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": name or f"{self.name}-g4",
            "SLURM_CONF": "/etc/slurm.conf", "SLURM_CPUS_PER_TASK": "2", "SBATCH_PARTITION": "wrong",
            "SECRET": "not for the worker",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.folder / "worker.sbatch")], env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *asks: str, name: str = "", **variables: str) -> tuple[int, str]:
        process = self.start(*asks, name=name, **variables)
        said, _ = process.communicate(timeout=END_SECONDS)
        return process.returncode, said

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("bin", "tmp", "home"):
        (tmp_path / name).mkdir()
    for name in ("queue", "image.sif"):
        (tmp_path / name).touch()
    programs = {"apptainer": APPTAINER, "squeue": SQUEUE, "sbatch": SBATCH, "scancel": SCANCEL, "scontrol": SCONTROL}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text.format(folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    return Place(tmp_path, tmp_path / "home")


@pytest.mark.parametrize("template", [*TEMPLATES, SLURM / "worker.sh"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(template: Path) -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("There is no shellcheck: install it, as the cluster's tests do.")
        pytest.skip("there is no shellcheck here")
    done = subprocess.run(["shellcheck", "-x", "-P", str(SLURM), str(template)], capture_output=True, text=True)
    assert not done.returncode, done.stdout


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_never_requeue_and_name_what_they_export(template: Path) -> None:
    text = template.read_text()
    assert "#SBATCH --no-requeue\n" in text
    assert "#SBATCH --export=HOME,USER,LOGNAME,PATH,LANG\n" in text
    assert "#SBATCH --signal=B:USR2@90\n" in text


def test_a_worker_runs_in_its_image_with_what_it_needs_and_nothing_more(place: Place) -> None:
    status, said = place.run()
    assert status == 0, said
    command = place.lines("command")
    assert command[:3] == ["exec", "--containall", "--cleanenv"]
    at = command.index(str(place.folder / "image.sif"))
    assert command[at + 1 : at + 9] == [
        "edif-hpc", "worker", "--home", str(place.home), "--id", "worker-cpu-7c0d12-g4", "--pool", "cpu",
    ]  # fmt: skip
    assert command[-6:] == ["--lineage", "7c0d12", "--generation", "4", "--supervisor", "/tmp/supervisor"]
    deadline = float(command[command.index("--deadline") + 1])
    assert 3500 < deadline - time.time() < 3700
    assert "--env=SLURM_JOB_ID=77" in command
    assert "SECRET" not in " ".join(command)
    assert not list((place.folder / "tmp").iterdir()), "its scratch is gone"


def test_the_first_of_a_chain_gives_itself_its_name(place: Place) -> None:
    place.run(name="worker-cpu.sbatch")
    (renamed,) = place.lines("scontrol")
    assert re.search(r"JobName=edif-[0-9a-f]{6}-cpu-[0-9a-f]{6}-g1$", renamed)


@pytest.mark.parametrize(
    ("handover", "dependency"), [("overlap", "singleton"), ("requeue", "afterany:77,singleton")]
)  # fmt: skip
def test_a_successor_is_submitted_once(place: Place, handover: str, dependency: str) -> None:
    status, said = place.run("successor 5", "successor 5", HANDOVER=handover)
    assert status == 0, said
    assert place.lines("answers") == ["successor 5 submitted 78"] * 2
    (submitted,) = place.lines("submitted")
    assert f"--job-name={place.name}-g5 --dependency={dependency} {place.folder}/worker.sbatch" in submitted
    assert place.lines("leaked") == ["SLURM_CONF=/etc/slurm.conf"]


def test_one_that_is_there_already_is_not_submitted_again(place: Place) -> None:
    (place.folder / "queue").write_text(f"42 RUNNING {place.name}-g5\n43 RUNNING {place.name}-g55\n")
    place.run("successor 5")
    assert place.lines("answers") == ["successor 5 submitted 42"]
    assert not place.lines("submitted")


@pytest.mark.parametrize(
    ("hindrance", "variables", "words"),
    [
        ("silent", {}, "Slurm does not answer"),
        ("refuse", {}, "Invalid account"),
        ("stop", {"STOP_FILE": "$EDIF_HOME/../stop"}, "stop file"),
        ("", {"MOST_GENERATIONS": "4"}, "ends after 4"),
        ("", {"LEAST_UPTIME": "3600"}, "younger than 3600 s"),
    ],
)  # fmt: skip
def test_nothing_is_submitted_when_it_must_not_be(
    place: Place, hindrance: str, variables: dict[str, str], words: str
) -> None:
    if hindrance:
        (place.folder / hindrance).touch()
    place.run("successor 5", **variables)
    (answer,) = place.lines("answers")
    assert answer.startswith("successor 5 refused")
    assert words in answer
    assert not place.lines("submitted")


def test_only_the_next_generation_may_be_asked_for(place: Place) -> None:
    place.run("successor 7")
    assert place.lines("answers") == ["successor 7 refused Generation 4 has no other errand than for the next."]


def test_a_pending_successor_is_taken_back_and_a_running_one_left(place: Place) -> None:
    place.run("successor 5", "recall 5")
    assert place.lines("answers")[-1] == "recall 5 done"
    assert place.lines("cancelled") == ["78"]
    (place.folder / "queue").write_text(f"78 RUNNING {place.name}-g5\n")
    place.run("recall 5")
    assert place.lines("cancelled") == ["78"]


def test_signals_reach_the_worker_and_one_that_was_told_is_not_started_again(place: Place) -> None:
    (place.folder / "stay").touch()
    process = place.start()
    eventually(lambda: place.lines("served"), END_SECONDS, "the worker")
    os.kill(process.pid, signal.SIGUSR2)
    eventually(lambda: place.lines("signals") == ["USR2"], END_SECONDS, "USR2 at the worker")
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=END_SECONDS)
    assert place.lines("signals") == ["USR2", "TERM"]
    assert (process.returncode, len(place.lines("served"))) == (0, 1), said


def test_a_worker_that_crashed_is_started_again(place: Place) -> None:
    (place.folder / "status").write_text("9")
    process = place.start()
    eventually(lambda: len(place.lines("served")) >= 2, END_SECONDS, "the second start")
    (place.folder / "status").write_text("0")
    process.communicate(timeout=END_SECONDS)
    assert process.returncode == 0


def test_what_is_missing_is_said_in_a_sentence(place: Place) -> None:
    (place.folder / "image.sif").unlink()
    status, said = place.run()
    assert status == 1
    assert "There is no image" in said
