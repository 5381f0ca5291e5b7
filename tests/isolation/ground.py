"""What lies around a hostile block: the service's own processes, ports and files, and bystanders of the same user.

Everything an attacker could find out is simply told, so that no attack fails for want of an address.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import edif_hpc
from edif_hpc.core.endpoints import embedded_ports
from edif_hpc.core.home import Home
from tests.support.servers import eventually
from tests.support.stack import Stack, passable

CANARY = "a-canary-of-another-user-5d1f"
TOKEN = "a-token-of-a-bystander-77c0"
NOT_RECORDS = ("ports", "up", "failures")


@dataclass
class Ground:
    stack: Stack
    folder: Path
    """Everybody may write here: where an attack leaves a mark that the test can see."""
    tcp: int
    udp: int
    unix: str
    abstract: str
    bystander: int

    @property
    def level(self) -> str:
        return self.stack.level

    def records(self) -> dict[str, int]:
        """Components by name -> pid, from the home's own records; the worker is `agent`."""
        found = {}
        for path in (self.stack.home / "run").glob("*.json"):
            if path.stem not in NOT_RECORDS:
                name = "agent" if path.stem.startswith("worker-") else path.stem
                with suppress(FileNotFoundError):  # it ended while we looked
                    found[name] = int(json.loads(path.read_text())["pid"])
        return found

    def model_processes(self) -> dict[str, int]:
        """`host`, and `zygote` where there is one, by their command lines."""
        agent = self.records().get("agent")
        found = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(agent).children(recursive=True) if agent else []:
                with suppress(psutil.NoSuchProcess):
                    line = child.cmdline()
                    for name in ("host", "zygote"):
                        # The executors are forks of the zygote and carry its command line.
                        if f"edif_hpc.worker.{name}" in line and name not in found:
                            found[name] = child.pid
        return found

    def executors(self) -> set[int]:
        """Every process below the zygote, or below the host at level none."""
        processes = self.model_processes()
        root = processes.get("zygote") or processes.get("host")
        with suppress(psutil.NoSuchProcess):
            return {child.pid for child in psutil.Process(root).children(recursive=True)} if root else set()
        return set()

    def told(self) -> dict[str, Any]:
        home, ports = self.stack.home, embedded_ports(Home(self.stack.home))
        return {
            "home": str(home),
            "folder": str(self.folder),
            "tcp": self.tcp,
            "udp": self.udp,
            "unix": self.unix,
            "abstract": self.abstract,
            "gateway": int(self.stack.url.rpartition(":")[2]),
            "redis": ports["redis"],
            "store": ports["store"],
            "bystander": self.bystander,
            "pids": {**self.records(), **self.model_processes()},
            "source": str(Path(edif_hpc.__file__)),
            "canary": CANARY[::-1],  # reversed, so that the question itself is not an answer
            "token": TOKEN,
        }

    def mark(self, name: str) -> Path:
        return self.folder / name


@contextmanager
def laid_out(stack: Stack, folder: Path) -> Iterator[Ground]:
    """Listeners of every kind that a block could reach if nothing held it, and a process of the service's user."""
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    passable(folder)
    with ExitStack() as ends:
        tcp = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = ends.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        path, name = str(folder / "listener"), f"edif-test-{os.getpid()}-{stack.level}"
        for address in (path, f"\0{name}"):
            listener = ends.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
        os.chmod(path, 0o777)
        identity: dict[str, Any] = {"user": stack.uid, "group": stack.uid, "extra_groups": []} if stack.uid else {}
        bystander = subprocess.Popen(["/bin/sleep", "3600"], env={"TOKEN": TOKEN}, cwd="/", **identity)
        try:
            yield Ground(stack, folder, tcp.getsockname()[1], udp.getsockname()[1], path, name, bystander.pid)
        finally:
            bystander.kill()
            bystander.wait()


def gone(pid: int) -> None:
    """Wait until a process has ended."""
    eventually(lambda: not _alive(pid), 30, f"the end of process {pid}")


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
