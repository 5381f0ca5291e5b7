"""A whole stack as a newcomer starts it: the real command line, real processes, in a home of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from edif_hpc.core.home import Home
from edif_hpc.fleet import process
from tests.support.servers import eventually, free_port

COMMAND_SECONDS = 120
COMPONENTS = ("gateway", "fleet", "redis", "store")


@dataclass
class Stack:
    """One home and the command line over it."""

    home: Path
    port: int = field(default_factory=free_port)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ping", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDIF_HPC_", "NDIF_"))}
        # No key of the person who runs the tests.
        return {**kept, "XDG_CONFIG_HOME": str(self.home.parent / "config"), **self.variables}

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One command of `edif-hpc` on this home."""
        done = subprocess.run(
            [sys.executable, "-m", "edif_hpc.cli", *arguments, "--home", str(self.home)],
            env=self.environment(), capture_output=True, text=True, timeout=COMMAND_SECONDS,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"edif-hpc {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The same, left running."""
        return subprocess.Popen(
            [sys.executable, "-m", "edif_hpc.cli", *arguments, "--home", str(self.home)],
            env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def up(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("up", "--detach", "--port", str(self.port), *options, check=check)

    def down(self) -> subprocess.CompletedProcess[str]:
        return self.run("down")

    def pids(self) -> dict[str, int]:
        """Living components by name, from their records; `ps` reads the same, and costs a process each time."""
        return {record.name: record.pid for record in process.records(Home(self.home)) if record.alive}

    def kill(self, name: str, with_signal: signal.Signals = signal.SIGKILL) -> int:
        pid = self.pids()[name]
        os.kill(pid, with_signal)
        return pid

    def back(self, name: str, not_pid: int, seconds: float = 30.0) -> int:
        """Wait until a component runs again under another pid."""
        return eventually(
            lambda: (pid := self.pids().get(name)) is not None and pid != not_pid and pid,
            seconds,
            f"{name} coming back",
        )

    def processes(self) -> list[psutil.Process]:
        """Every process of this stack, found by the home in what it was started with, never by our own records."""
        found = []
        for candidate in psutil.process_iter(["pid", "cmdline", "environ", "cwd", "status"]):
            info = candidate.info
            told = " ".join([*(info["cmdline"] or []), *(info["environ"] or {}).values(), info["cwd"] or ""])
            if str(self.home) in told and info["pid"] != os.getpid() and info["status"] != psutil.STATUS_ZOMBIE:
                found.append(candidate)
        return found


@contextmanager
def stack(folder: Path, **variables: str) -> Iterator[Stack]:
    """A home that is brought down at the end, whatever happened."""
    made = Stack(folder / "home", variables=variables)
    try:
        yield made
    finally:
        if made.home.exists():
            made.run("down", check=False)
        for left in made.processes():
            left.kill()
