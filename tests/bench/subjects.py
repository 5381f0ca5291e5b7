"""What is measured: the floor, and the service at one isolation level. Both answer the same wire at a URL.

All of them stay up for the whole run, so that measuring can go round and round between them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from nnsight.schema.config import CONFIG
from redis import Redis

from edif_hpc.core.endpoints import OWNER_KEY
from edif_hpc.core.home import Home
from tests.support.models import REPO
from tests.support.servers import eventually, free_port, redis_server

from .asks import Ask

FLOOR = "floor"
LOAD_SECONDS = 120
UP_SECONDS = 120
ORDINARY_UID = 61234
"""Whom a service runs as when this runs as root: isolation is another matter for root."""
SETTINGS = """
[gateway]
port = {port}
[models]
cache = "{hub}"
[worker]
threads = {threads}
idle_seconds = 86400
"""
MODEL_PROCESSES = ("edif_hpc.worker.host", "edif_hpc.worker.zygote")
"""Model host, zygote and executors, which are forks of the zygote: they hold models and requests, not the service."""


@dataclass
class Subject:
    """Something that answers. `home` is None for the floor; `sent` counts requests since its start."""

    name: str
    url: str
    key: str = field(default="", repr=False)
    home: Path | None = None
    sent: int = 0

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def point_stock_client(self) -> None:
        CONFIG.API.HOST, CONFIG.API.APIKEY, CONFIG.APP.REMOTE_LOGGING = self.url, self.key or None, False

    def processes(self) -> list[psutil.Process]:
        """Every process of the service: those whose command names its home, and their descendants."""
        home, found = str(self.home), {}
        for process in psutil.process_iter(["cmdline"]):
            if home in (process.info["cmdline"] or []):
                found.update({each.pid: each for each in (process, *process.children(recursive=True))})
        return list(found.values())

    def process(self, component: str) -> psutil.Process:
        return next(each for each in self.processes() if component in each.cmdline())


def is_model_process(process: psutil.Process) -> bool:
    return any(module in process.cmdline() for module in MODEL_PROCESSES)


@contextmanager
def floor(folder: Path, hub: Path, asks: list[Ask], threads: int) -> Iterator[Subject]:
    port = free_port()
    environment = {
        **os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    children: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        command = [sys.executable, "-m", "tests.bench.floor", *arguments]
        children.append(subprocess.Popen(command, cwd=REPO, env=environment, stderr=log))

    (folder / "redis").mkdir(parents=True)
    with redis_server(folder / "redis") as endpoint, (folder / "floor.log").open("w") as log:
        url = endpoint.with_credentials()
        try:
            start("server", str(port), url)
            for ask in asks:
                start("worker", url, ask.model_key)
            redis = Redis.from_url(url)
            for ask in asks:
                ready = f"ready:{ask.model_key}"
                eventually(lambda ready=ready: redis.get(ready), LOAD_SECONDS, f"the floor's {ask.name} model")
            yield Subject(FLOOR, f"http://127.0.0.1:{port}")
        finally:
            for child in children:
                child.kill()
                child.wait()


@contextmanager
def service(
    home: Path, hub: Path, level: str, threads: int, first: Callable[[Subject], None]
) -> Iterator[tuple[Subject, float]]:
    """A service in a cold home, and the seconds from `up` until `first`, one request, was answered."""
    port = free_port()
    home.mkdir(mode=0o700)
    (home / "edif-hpc.toml").write_text(SETTINGS.format(port=port, hub=hub, threads=threads))
    if os.geteuid() == 0:
        home.parent.chmod(0o711)
        for path in (home, *home.iterdir()):
            os.chown(path, ORDINARY_UID, ORDINARY_UID)
    subject = Subject(level, f"http://127.0.0.1:{port}", home=home)
    try:
        began = time.perf_counter()
        _command(home, "up", "--detach", "--isolation", level)
        # As root this process may read it; as the service's own user anyway.
        subject.key = (Home(home).secrets / OWNER_KEY).read_text().strip()
        first(subject)
        yield subject, time.perf_counter() - began
    finally:
        _command(home, "down")
        shutil.rmtree(home, ignore_errors=True)


def _command(home: Path, *arguments: str) -> None:
    """Run one `edif-hpc` command on this home, as the service's user."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "edif-hpc"), *arguments, "--home", str(home)],
        env={"PATH": os.environ["PATH"], "HOME": str(home)}, cwd="/", capture_output=True, text=True,
        timeout=UP_SECONDS, check=False, **_identity(),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"edif-hpc {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def _identity() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    return {"user": ORDINARY_UID, "group": ORDINARY_UID, "extra_groups": []}
