"""Writes down what a real Slurm prints, for the tests of parsers: `python -m tests.cluster.capture FOLDER`, as root.

Each file begins with a comment: version, command, exit status and which stream follows. Names that belong to the
machine it ran on are replaced; all else is as it was printed.
"""

from __future__ import annotations

import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.slurm import Cluster

from . import bed

SQUEUE = ("squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%S|%e|%N|%j")
SLOW_TO_DIE = "trap '' TERM; echo ready; while true; do sleep 1; done"


class Book:
    """The folder of captured text."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.version = cluster.run(["squeue", "--version"]).stdout.split()[-1]

    def take(self, name: str, *command: str, stdin: str = "") -> str:
        """Run a command as the user and write down what it printed, on standard error if that is not empty."""
        done = self.cluster.run(command, stdin=stdin, check=False)
        stream, text = ("stderr", done.stderr) if done.stderr else ("stdout", done.stdout)
        head = f"# Slurm {self.version}; {' '.join(command)}; exit {done.returncode}; {stream}\n"
        (self.folder / f"{name}.txt").write_text(head + self._anonymous(text))
        return done.stdout.strip()

    def _anonymous(self, text: str) -> str:
        for mine, other in (
            (str(self.cluster.home), "/home/ann"),
            (str(self.cluster.folder), "/cluster"),
            (platform.release(), "6.1.0"),
            (platform.version(), "#1 SMP"),
        ):
            text = text.replace(mine, other)
        text = re.sub(rf"\b{re.escape(self.cluster.user)}\({self.cluster.uid}\)", "ann(1234)", text)
        text = re.sub(rf"\b{re.escape(self.cluster.user)}\({self.cluster.gid}\)", "ann(1234)", text)
        text = re.sub(rf"\b{re.escape(self.cluster.user)}\b", "ann", text)
        return re.sub(rf"\b{re.escape(socket.gethostname())}(?=[(:])", "login1", text)


def submissions(book: Book) -> None:
    """What sbatch says when it takes a job and when it does not."""
    script = "#!/bin/bash\nsleep 300\n"
    for name, *options in (
        ("accepted",),
        ("invalid-partition", "--partition=nowhere"),
        ("forbidden-partition", "--partition=members"),
        ("account", "--account=nobody"),
        ("invalid-qos", "--qos=nothing"),
        ("too-long", "--time=1-00:00:00"),
        ("too-many-nodes", "--nodes=9"),
        ("too-many-nodes-of-a-partition", "--partition=single", "--nodes=2"),
        ("too-many-gpus", "--gres=gpu:8"),
        ("unknown-gpu", "--gres=gpu:h100:1"),
        ("too-much-memory", "--mem=1T"),
        ("unknown-option", "--no-such-option"),
        ("invalid-time", "--time=soon"),
        ("unknown-dependency", "--dependency=afterok:999999"),
        ("invalid-reservation", "--reservation=none"),
        ("invalid-feature", "--constraint=infiniband"),
    ):
        book.take(f"sbatch-{name}", "sbatch", "--parsable", *options, stdin=script)
    book.take("sbatch-accepted-not-parsable", "sbatch", stdin=script)
    book.take("sbatch-no-script", "sbatch", "--parsable", "missing.sh")
    book.take("sbatch-not-a-script", "sbatch", "--parsable", stdin="sleep 1\n")
    book.cluster.cancel_all()


def listings(book: Book) -> None:
    """squeue, scontrol and sinfo with pending, running and completing jobs."""
    cluster = book.cluster
    running = cluster.submit("sleep 300", "--job-name=edif helma|1", "--nodes=2", "--gres=gpu:1", "--time=30")
    cluster.wait_running(running)
    pending = cluster.submit("sleep 300", "--job-name=pool-g2", "--gres=gpu:2", "--nodes=2")
    cluster.submit("sleep 300", "--job-name=pool-g2", "--dependency=singleton")
    cluster.submit("sleep 300", "--job-name=held", "--hold")
    cluster.submit("sleep 300", "--job-name=later", "--begin=now+1hour")
    cluster.submit("sleep 300", "--job-name=array", "--array=0-3%1")
    stubborn = cluster.submit(f'srun bash -c "{SLOW_TO_DIE}"', "--job-name=stubborn", "--gres=gpu:1", "--time=5")
    cluster.wait(lambda: "ready" in cluster.output(stubborn), what="the stubborn job")
    # An estimate of the start comes with the next round of the backfill scheduler.
    cluster.wait(
        lambda: cluster.details(pending)["StartTime"] not in {"Unknown", "N/A"}, 90.0, "an estimate for the pending"
    )
    cluster.run(["scancel", stubborn])
    cluster.wait(lambda: any(job.state == "COMPLETING" for job in cluster.jobs()), what="a completing job")
    book.take("squeue", *SQUEUE)
    book.take("squeue-time-left", "squeue", "--noheader", "--format=%i|%j|%T|%r|%S|%e|%L|%N")
    book.take("squeue-end-of-one", "squeue", "--noheader", "--jobs", running, "--format=%e")
    book.take("squeue-unknown-job", *SQUEUE, "--jobs", "999999")
    book.take("squeue-unknown-user", *SQUEUE, "--user", "nobody-at-all")
    book.take("squeue-nobodys", *SQUEUE, "--user", "root")
    book.take("scontrol-show-job-running", "scontrol", "show", "job", "--oneliner", running)
    book.take("scontrol-show-job-pending", "scontrol", "show", "job", "--oneliner", pending)
    book.take("scontrol-show-job-unknown", "scontrol", "show", "job", "--oneliner", "999999")
    book.take("scontrol-show-node", "scontrol", "show", "node", "--oneliner")
    book.take("scontrol-ping", "scontrol", "ping")
    book.take("sinfo", "sinfo", "--noheader", "--format=%P|%a|%l|%D|%T|%N|%G|%c|%m")
    book.take("sinfo-nodes", "sinfo", "--noheader", "--Node", "--format=%N|%T|%G|%c|%m|%E")
    book.take("scancel-unknown", "scancel", "999999")
    book.take("sacct-without-accounting", "sacct", "--parsable2", "--jobs", running)
    cluster.cancel_all()


def failures(book: Book) -> None:
    """What commands say when slurmctld hangs and when it is gone."""
    for name, command in (("squeue", SQUEUE), ("sbatch", ("sbatch", "--parsable")), ("scancel", ("scancel", "1"))):
        with book.cluster.paused_controller():
            book.take(f"{name}-controller-hangs", *command, stdin="#!/bin/bash\ntrue\n")
    book.cluster.stop("slurmctld")
    for name, command in (("squeue", SQUEUE), ("sbatch", ("sbatch", "--parsable")), ("scancel", ("scancel", "1"))):
        book.take(f"{name}-controller-gone", *command, stdin="#!/bin/bash\ntrue\n")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with bed.running() as cluster:
        book = Book(cluster, folder)
        submissions(book)
        listings(book)
        failures(book)
    subprocess.run(["ls", "-l", str(folder)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
