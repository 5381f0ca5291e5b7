"""The sbatch templates with Slurm's commands and Apptainer as executables on PATH: what they submit, and when not."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edif_hpc.fleet.slurm import container, names
from edif_hpc.hardware.profiles import PROFILES
from tests.support.models import REPO
from tests.support.servers import eventually

pytestmark = pytest.mark.fast

SLURM = REPO / "slurm"
TEMPLATES = sorted(SLURM.glob("worker-*.sbatch"))
APPTAINER = """#!/bin/bash
# Writes down what it was given, then speaks for a worker until a file or a signal ends it.
folder={folder}
printf '%s\\n' "$@" > "$folder/arguments"
env > "$folder/environment"
for argument in "$@"; do case "$argument" in *:/tmp) scratch=${{argument%:/tmp}};; esac; done
trap 'echo USR2 >> "$folder/signals"' USR2
trap 'echo TERM >> "$folder/signals"; exit 0' TERM
exec 5<> "$scratch/supervisor/asks" 6<> "$scratch/supervisor/answers"
(while read -r line <&6; do echo "$line" >> "$folder/answers"; done) &
reader=$!
trap 'kill "$reader"' EXIT
echo started >> "$folder/starts"
while [ ! -e "$folder/end" ]; do
    if [ -e "$folder/ask" ]; then cat "$folder/ask" >&5; rm "$folder/ask"; fi
    [ -e "$folder/crash" ] && {{ rm "$folder/crash"; exit 3; }}
    sleep 0.05
done
"""
SQUEUE = """#!/bin/bash
folder={folder}
echo "$@" >> "$folder/asked"
[ -e "$folder/silent" ] && {{ echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }}
case "$*" in *--format=%e) date -d "@$(($(date +%s) + 3600))" +%FT%T;; *) cat "$folder/queue";; esac
"""
SBATCH = """#!/bin/bash
folder={folder}
echo "$@" >> "$folder/submitted"
env > "$folder/sbatch-environment"
[ -e "$folder/refuse" ] && {{ echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1; }}
name=$(printf '%s\\n' "$@" | sed -n 's/--job-name=//p')
echo "78|PENDING|$name" >> "$folder/queue"
echo 'sbatch: this site says hello' >&2
echo '78;cluster'
"""
SCONTROL = """#!/bin/bash
folder={folder}
echo "$@" >> "$folder/controlled"
[ "$1" = update ] || echo "JobId=77 JobName=x Command=$folder/worker.sbatch WorkDir=/ StdErr=/x"
"""
SCANCEL = """#!/bin/bash
echo "$@" >> {folder}/cancelled
"""
LINEAGE = "7c0d12"


@dataclass
class Bench:
    """A template with a home, and executables that write into `folder` what they were asked."""

    folder: Path
    home: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    scripts: Path = SLURM
    """Where the template finds `worker.sh`."""

    def name(self, generation: int) -> str:
        return names.Name(names.tag(self.home), "cpu", LINEAGE, generation).allocation

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def start(self, generation: int = 3, template: str = "worker-cpu", **changes: str) -> subprocess.Popen[str]:
        """Run the template, with these variables set otherwise; returns when its worker works."""
        process = self.run(generation, template, changes)
        eventually(lambda: self.text("starts"), 20.0, "the worker")
        return process

    def run(self, generation: int, template: str, changes: dict[str, str]) -> subprocess.Popen[str]:
        """Run the template as this generation; 0: as somebody submitted it."""
        script = self.folder / "worker.sbatch"
        values = {"LEAST_UPTIME": "0", **changes}
        text = (SLURM / f"{template}.sbatch").read_text()
        paths = {"/SHARED/edif-home": self.home, "/SHARED/edif_hpc/slurm": self.scripts}
        for written, path in {**paths, "/SHARED/hub": self.folder / "hub", "/SHARED/images": self.folder}.items():
            text = text.replace(written, str(path))
        for key, value in values.items():
            text, count = re.subn(rf"^(    {key})=.*$", lambda found, new=value: f"{found[1]}={new}", text, flags=re.M)  # type: ignore[misc]
            assert count == 1, key
        script.write_text(text)
        name = self.name(generation) if generation else "worker-cpu.sbatch"
        with (self.folder / "said").open("w") as said:
            process = subprocess.Popen(
                ["bash", script], stdout=said, stderr=subprocess.STDOUT, text=True,
                env={
                    "PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), "TMPDIR": str(self.folder),
                    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": name, "SLURM_CPUS_PER_TASK": "8", "SBATCH_EXPORT": "ALL",
                    "SLURM_CONF": "/etc/slurm.conf", "SECRET": "s3cr3t", "ROCR_VISIBLE_DEVICES": "0",
                },
            )  # fmt: skip
        self.started.append(process)
        return process

    def ask(self, words: str) -> str:
        """What the template answers to an errand."""
        before = len(self.text("answers").splitlines())
        half = self.folder / "half"
        half.write_text(f"{words}\n")
        half.rename(self.folder / "ask")
        eventually(lambda: len(self.text("answers").splitlines()) > before, 20.0, "an answer")
        return self.text("answers").splitlines()[-1]

    def end(self, process: subprocess.Popen[str]) -> int:
        (self.folder / "end").touch()
        return process.wait(20)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("apptainer", APPTAINER), ("squeue", SQUEUE), ("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)
    ):  # fmt: skip
        (programs / name).write_text(text.format(folder=tmp_path))
        (programs / name).chmod(0o755)
    (tmp_path / "home" / "logs").mkdir(parents=True)
    for kind in ("cpu", "cuda", "rocm"):
        (tmp_path / f"worker-{kind}.sif").touch()
    (tmp_path / "queue").write_text("77|RUNNING|edif-000000-other-000000-g3\n")
    found = Bench(tmp_path, tmp_path / "home")
    yield found
    (tmp_path / "end").touch()
    for process in found.started:
        process.wait(20)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("There is no shellcheck: install it, as the cluster's tests do.")
        pytest.skip("there is no shellcheck here")
    done = subprocess.run(
        ["shellcheck", "-x", SLURM / "worker.sh", *TEMPLATES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.stem)
def test_a_template_has_what_keeps_chains_from_running_away(template: Path) -> None:
    text = template.read_text()
    assert "#SBATCH --no-requeue\n" in text
    assert "#SBATCH --signal=B:USR2@90\n" in text
    assert "#SBATCH --export=HOME,USER,LOGNAME,PATH,LANG\n" in text
    profile = PROFILES[template.stem.removeprefix("worker-")]
    assert f"    APPTAINER=({' '.join(profile.apptainer)})\n" in text
    assert f"    VISIBLE=({' '.join(profile.visibility)})\n" in text


def test_the_worker_gets_what_the_supervisor_would_give_it(bench: Bench) -> None:
    process = bench.start()
    arguments = bench.text("arguments").splitlines()
    assert arguments[:5] == ["exec", "--containall", "--cleanenv", "--no-eval", "--pwd"]
    for name in container.CACHES:
        assert any(part.startswith(f"--env={name}=/tmp/") for part in arguments)
    assert "--env=SLURM_JOB_ID=77" in arguments
    assert "--env=SLURM_CPUS_PER_TASK=8" in arguments
    assert f"{bench.folder}/hub:{bench.folder}/hub:ro" in arguments
    if bench.home.is_relative_to("/tmp"):  # covered there by the allocation's own folder
        (scratch,) = bench.folder.glob("edif-hpc-77-*")
        assert (scratch / bench.home.relative_to("/tmp")).is_dir()
    given = dict(itertools.pairwise(arguments))
    assert given["--id"] == f"worker-cpu-{LINEAGE}-g3"
    assert (given["--pool"], given["--lineage"], given["--generation"]) == ("cpu", LINEAGE, "3")
    assert given["--supervisor"] == "/tmp/supervisor"
    assert 3000 < float(given["--deadline"]) - time.time() < 3700
    assert "s3cr3t" not in bench.text("arguments")
    assert not any(part.startswith("--env=ROCR") for part in arguments)
    assert bench.end(process) == 0


def test_on_amd_the_devices_that_slurm_named_go_in(bench: Bench) -> None:
    bench.start(template="worker-rocm", POOL="cpu")
    arguments = bench.text("arguments").splitlines()
    assert "--rocm" in arguments
    assert [part for part in arguments if "VISIBLE" in part] == ["--env=ROCR_VISIBLE_DEVICES=0"]


def test_what_an_admin_writes_for_nccl_goes_in(bench: Bench) -> None:
    bench.start(template="worker-cuda", POOL="cpu", NETWORK="(NCCL_IB_HCA==mlx5_0:1,mlx5_3:1 NCCL_SOCKET_IFNAME=ib0)")
    arguments = bench.text("arguments").splitlines()
    assert [part for part in arguments if part.startswith("--env=NCCL")] == [
        "--env=NCCL_IB_HCA==mlx5_0:1,mlx5_3:1",
        "--env=NCCL_SOCKET_IFNAME=ib0",
    ]


def test_an_allocation_without_a_name_becomes_the_first_of_a_lineage(bench: Bench) -> None:
    bench.start(generation=0)
    name = re.search(r"JobName=(\S+)", bench.text("controlled"))
    assert name
    read = names.read(name[1], bench.home)
    assert read
    assert (read.pool, read.generation) == ("cpu", 1)
    assert f"--env=SLURM_JOB_NAME={name[1]}" in bench.text("arguments").splitlines()


def test_a_successor_is_submitted_once_and_without_this_allocations_environment(bench: Bench) -> None:
    bench.start()
    assert bench.ask("successor 4") == "successor 4 submitted 78"
    assert bench.ask("successor 4") == "successor 4 submitted 78"
    (submitted,) = bench.text("submitted").splitlines()
    assert f"--job-name={bench.name(4)} --dependency=singleton {bench.folder}/worker.sbatch" in submitted
    leaked = [line for line in bench.text("sbatch-environment").splitlines() if line.startswith(("SLURM_", "SBATCH_"))]
    assert leaked == ["SLURM_CONF=/etc/slurm.conf"]


def test_in_requeue_mode_it_waits_for_the_end_of_this_one(bench: Bench) -> None:
    bench.start(HANDOVER="requeue")
    assert bench.ask("successor 4") == "successor 4 submitted 78"
    assert "--dependency=afterany:77,singleton " in bench.text("submitted")


def test_one_that_is_in_the_queue_is_not_submitted_again(bench: Bench) -> None:
    (bench.folder / "queue").write_text(f"77|RUNNING|{bench.name(3)}\n91|PENDING|{bench.name(4)}\n")
    bench.start()
    assert bench.ask("successor 4") == "successor 4 submitted 91"
    assert not bench.text("submitted")


def test_what_else_its_user_runs_need_not_be_understood(bench: Bench) -> None:
    foreign = "123+0|EXPEDITING|het\n5_[1-3]|launch failed|array\n|?|a|b|c\n"
    (bench.folder / "queue").write_text(f"{foreign}91|PENDING|{bench.name(4)}\n")
    bench.start()
    assert bench.ask("successor 4") == "successor 4 submitted 91"
    (bench.folder / "queue").write_text(foreign)
    assert bench.ask("successor 4") == "successor 4 submitted 78"
    (bench.folder / "queue").write_text(f"91|?|{bench.name(4)}\n")
    assert bench.ask("recall 4").startswith("recall 4 refused Slurm does not tell")


@pytest.mark.parametrize("said", ["silent", "garbled"])
def test_nothing_is_submitted_while_slurm_does_not_say_what_there_is(bench: Bench, said: str) -> None:
    bench.start()
    if said == "silent":
        (bench.folder / "silent").touch()
    else:
        (bench.folder / "queue").write_text("slurmctld is very busy\n")
    assert bench.ask("successor 4").startswith("successor 4 refused Slurm does not tell")
    assert bench.ask("recall 4").startswith("recall 4 refused Slurm does not tell")
    assert not bench.text("submitted") + bench.text("cancelled")
    (bench.folder / "silent").unlink(missing_ok=True)
    (bench.folder / "queue").write_text("")
    assert bench.ask("successor 4") == "successor 4 submitted 78"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("LEAST_UPTIME", "600", "younger than 600 s"),
        ("MOST_GENERATIONS", "3", "after 3 allocations"),
        ("STOP_FILE", "/dev/null", "stop file /dev/null exists"),
    ],
)
def test_guards_refuse(bench: Bench, key: str, value: str, words: str) -> None:
    bench.run(3, "worker-cpu", {key: value})
    eventually(lambda: bench.text("starts"), 20.0, "the worker")
    said = bench.ask("successor 4")
    assert said.startswith("successor 4 refused ")
    assert words in said
    assert not bench.text("submitted")


def test_what_sbatch_refuses_is_passed_on(bench: Bench) -> None:
    bench.start()
    (bench.folder / "refuse").touch()
    assert "Invalid account" in bench.ask("successor 4")


def test_no_other_generation_is_anybodys_errand(bench: Bench) -> None:
    bench.start()
    assert bench.ask("successor 5").startswith("successor 5 refused Generation 3")
    assert not bench.text("submitted")


@pytest.mark.parametrize(("state", "cancelled"), [("PENDING", "--quiet --state=PENDING 91\n"), ("RUNNING", "")])
def test_a_recall_cancels_what_has_not_begun(bench: Bench, state: str, cancelled: str) -> None:
    bench.start()
    (bench.folder / "queue").write_text(f"91|{state}|{bench.name(4)}\n")
    assert bench.ask("recall 4") == "recall 4 done"
    assert bench.text("cancelled") == cancelled


def test_signals_reach_the_worker_and_it_is_not_started_again(bench: Bench) -> None:
    process = bench.start()
    process.send_signal(signal.SIGUSR2)
    eventually(lambda: "USR2" in bench.text("signals"), 20.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert bench.text("signals").split() == ["USR2", "TERM"]
    assert bench.text("starts").split() == ["started"]
    assert not list(bench.folder.glob("edif-hpc-77-*"))


def test_a_worker_that_crashed_is_started_again(bench: Bench) -> None:
    process = bench.start()
    (bench.folder / "crash").touch()
    eventually(lambda: len(bench.text("starts").split()) == 2, 20.0)
    assert bench.ask("successor 4") == "successor 4 submitted 78"
    assert bench.end(process) == 0


def test_one_that_lived_long_is_forgiven_its_crashes(bench: Bench) -> None:
    bench.scripts = bench.folder / "scripts"
    bench.scripts.mkdir()
    text = (SLURM / "worker.sh").read_text()
    assert "\nsteady=300 " in text
    (bench.scripts / "worker.sh").write_text(text.replace("\nsteady=300 ", "\nsteady=-1 "))
    process = bench.start()
    for starts in range(2, 6):  # one more than are started again of those that die young
        (bench.folder / "crash").touch()
        eventually(lambda starts=starts: len(bench.text("starts").split()) == starts, 20.0, f"start {starts}")  # type: ignore[misc]
    assert bench.end(process) == 0


def test_one_that_is_told_to_end_before_its_worker_runs_starts_none(bench: Bench) -> None:
    program = bench.folder / "bin" / "hostname"
    program.write_text(
        f"#!/bin/bash\ntouch {bench.folder}/late\nwhile [ ! -e {bench.folder}/go ]; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    process = bench.run(3, "worker-cpu", {})
    eventually(lambda: (bench.folder / "late").exists(), 20.0, "the end of the set-up")
    process.send_signal(signal.SIGTERM)
    (bench.folder / "go").touch()
    assert process.wait(20) == 0
    assert not bench.text("starts")
    assert not list(bench.folder.glob("edif-hpc-77-*"))


def test_what_is_missing_is_named(bench: Bench) -> None:
    (bench.folder / "worker-cpu.sif").unlink()
    assert bench.run(3, "worker-cpu", {}).wait(20) == 1
    assert "edif-hpc image build" in bench.text("said")
