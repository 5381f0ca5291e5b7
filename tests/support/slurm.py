"""A real Slurm of two nodes, as tests use it: commands as an ordinary user, and the failures clusters have.

How it is brought up is `tests/cluster/bed.py`'s business, and what is run on it is the tests'. Each node has process,
network and mount namespaces and a host name of its own, so code that assumes a shared loopback, shared process ids or
one host name fails here as it would on a cluster. Files are shared, as on a cluster's parallel file system.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

CLUSTER = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(1500)]
"""`pytestmark = CLUSTER` in every file that uses it: one process has it, and the first test may wait or install it."""
NODES = ("node1", "node2")
POLL_SECONDS = 0.2
"""A squeue costs some 10 ms of processor time, and there may be only two cores for the whole cluster."""
NODE_LOST_SECONDS = 90
"""Slurm pings nodes every third of SlurmdTimeout, and then waits until it is over: some 40 s in all when idle."""


@dataclass(frozen=True)
class Job:
    """One line of squeue."""

    id: str
    state: str
    reason: str
    node: str
    name: str


@dataclass
class Cluster:
    """A running cluster. Commands run as `user` on the login side, which is this machine, unless they say otherwise."""

    folder: Path
    user: str
    uid: int
    gid: int
    internal_address: str
    """The login side's address as nodes see it: what a service must advertise."""
    commands: Mapping[str, Sequence[str]] = field(repr=False)
    """How each daemon is started, by its name: munged, slurmctld and the nodes."""
    attach: Callable[[str, int], None] = field(repr=False)
    """Gives a node that has just been started its network."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        """The user's environment on the login side."""
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Arguments of `subprocess` that make a process the user's."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(
        self, arguments: Sequence[str | Path], *, stdin: str = "", check: bool = True, timeout: float = 60.0,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command as the user, in the user's home."""
        return self._run(arguments, stdin, check, timeout, environment, self.identity)

    def admin(
        self, *arguments: str, check: bool = True, timeout: float = 60.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root, whom this Slurm obeys."""
        return self._run(arguments, "", check, timeout, environment, {})

    def _run(
        self, arguments: Sequence[str | Path], stdin: str, check: bool, timeout: float, extra: Mapping[str, str],
        identity: Mapping[str, Any],
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        done = subprocess.run(
            [str(argument) for argument in arguments], input=stdin, env={**self.environment, **extra}, cwd=self.home,
            capture_output=True, text=True, timeout=timeout, check=False, **identity,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{arguments} exited {done.returncode}:\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def submit(self, script: str, *options: str) -> str:
        """Submit the lines of a bash script as the user; its id. Output goes to `output(id)` unless told otherwise."""
        # sbatch takes its options from the command line first, so a test's own --output wins over this line.
        head = f"#!/bin/bash\n#SBATCH --output={self.home}/slurm-%j.out\n"
        return self.run(["sbatch", "--parsable", *options], stdin=head + script).stdout.strip()

    def output(self, job_id: str) -> str:
        """What a submitted script has printed so far; empty before it starts."""
        path = self.home / f"slurm-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def jobs(self) -> list[Job]:
        """All that are pending, running or completing, of anybody."""
        said = self.admin("squeue", "--noheader", "--format=%i|%T|%r|%N|%j").stdout
        return [Job(*line.split("|", 4)) for line in said.splitlines()]

    def job(self, job_id: str) -> Job | None:
        """One of `jobs`; None when it has ended."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def details(self, job_id: str) -> dict[str, str]:
        """All that Slurm says about a job, also for some seconds after its end."""
        said = self.admin("scontrol", "show", "job", "--oneliner", job_id).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def node_states(self) -> dict[str, str]:
        """Slurm's word for each node, such as idle, mixed, down*; with `*` it does not answer."""
        said = self.admin("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=gpu").stdout
        return dict(line.split() for line in said.splitlines())

    def wait(self, predicate: Callable[[], T | None], seconds: float = 30.0, what: str = "the condition") -> T:
        """Poll until the predicate gives something true, and give that; else fail with what the cluster says."""
        deadline = time.monotonic() + seconds
        while True:
            value = predicate()
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come true within {seconds:g} s\n{self.report()}")
            time.sleep(POLL_SECONDS)  # between two looks

    def wait_running(self, job_id: str, seconds: float = 30.0) -> Job:
        return self.wait(
            lambda: next((job for job in self.jobs() if job.id == job_id and job.state == "RUNNING"), None),
            seconds, f"job {job_id} running",
        )  # fmt: skip

    def wait_ended(self, job_id: str, seconds: float = 30.0) -> dict[str, str]:
        """Wait until it is out of squeue; its details."""
        self.wait(lambda: self.job(job_id) is None, seconds, f"the end of job {job_id}")
        return self.details(job_id)

    def cancel_all(self) -> None:
        """End everybody's jobs, those included that they submit meanwhile, and wait until they are gone."""

        def none_left() -> bool:
            # Not the ids of `jobs`: one such as 16_[1-3%1] is refused, and nothing is cancelled.
            found = self.admin("squeue", "--noheader", "--format=%A").stdout.split()
            if found:
                self.admin("scancel", "--quiet", *found, check=False)  # some end by themselves
            return not found

        self.wait(none_left, 60.0, "an empty queue")

    def restore(self) -> None:
        """Back to two idle nodes and an empty queue, whatever a test did."""
        self.start("slurmctld")
        self.resume_controller()
        for node in NODES:
            self.start(node)
        self.cancel_all()
        if not self.all_idle():
            for node in NODES:
                # Refused where it is idle already, which is what is wanted.
                self.admin("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            self.wait(self.all_idle, NODE_LOST_SECONDS, "two idle nodes")

    def all_idle(self) -> bool:
        return self.node_states() == dict.fromkeys(NODES, "idle")

    def pause_controller(self) -> None:
        """slurmctld takes connections and answers nothing, as when it is overloaded: commands hang, then fail."""
        self.daemons["slurmctld"].send_signal(signal.SIGSTOP)

    def resume_controller(self) -> None:
        self.daemons["slurmctld"].send_signal(signal.SIGCONT)

    @contextmanager
    def paused_controller(self) -> Iterator[None]:
        self.pause_controller()
        try:
            yield
        finally:
            self.resume_controller()

    def start(self, daemon: str) -> None:
        """Start slurmctld or a node; nothing happens while it runs. A controller finds the jobs it knew."""
        running = self.daemons.get(daemon)
        if running is not None and running.poll() is None:
            return
        log = self.folder / "log" / f"{daemon}.out"
        with log.open("ab") as out:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.commands[daemon]], stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, cwd="/", start_new_session=True,
                env={**self.environment, "USER": "root", "LOGNAME": "root", "EDIF_HPC_TEST_BED": str(self.folder)},
            )  # fmt: skip
        self.daemons[daemon] = process
        if daemon in NODES:
            self.attach(daemon, process.pid)

    def stop(self, daemon: str) -> None:
        """Kill slurmctld or switch a node off: everything on it dies at once, and it no longer answers.

        Slurm notices a lost node within `NODE_LOST_SECONDS`.
        """
        process = self.daemons[daemon]
        process.kill()
        process.wait()

    def set_node(self, node: str, state: str, reason: str = "a test") -> None:
        """An admin's word about a node: `down`, `drain` or `resume`."""
        self.admin("scontrol", "update", f"nodename={node}", f"state={state}", f"reason={reason}")

    def pids_on(self, node: str) -> list[int]:
        """This machine's ids of all processes on a node, its own daemons among them."""
        own = os.readlink(f"/proc/{self.daemons[node].pid}/ns/net")
        return [pid for pid in processes() if _namespace(pid) == own]

    def report(self) -> str:
        """Queue, nodes and the ends of all logs, for a failing test."""
        asked = [
            subprocess.run(
                ["timeout", "5", *command], env=self.environment, capture_output=True, text=True, check=False
            )
            for command in (["squeue", "--all"], ["sinfo", "--long", "--Node"])
        ]
        return "\n".join([*(done.stdout + done.stderr for done in asked), self.logs()])

    def logs(self) -> str:
        """The ends of all logs."""
        found = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in found)


def processes() -> list[int]:
    """The ids of all processes of this machine."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""  # ended meanwhile
