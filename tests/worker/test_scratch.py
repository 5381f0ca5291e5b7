"""A killed worker's scratch folder is removed by the next worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edif_hpc.core.home import Home
from edif_hpc.core.scratch import OWNER
from tests.support.servers import eventually, redis_server


@contextmanager
def worker(home: Home, temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker by the command line, killed at the end."""
    command = [sys.executable, "-m", "edif_hpc.cli", "worker", "--home", str(home.root)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDIF_HPC_")}
    with (home.logs / "worker.log").open("a") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env={**kept, "TMPDIR": str(temporary)})
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def test_the_next_worker_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    temporary, redis_folder = tmp_path / "tmp", tmp_path / "redis"
    temporary.mkdir()
    redis_folder.mkdir()
    home = Home(tmp_path / "home").create()
    with redis_server(redis_folder) as redis:
        home.write_private(home.secrets / "redis", redis.password)
        home.write_private(home.secrets / "s3", "a\ns\n")
        home.config.write_text(
            f'[redis]\nurl = "{redis.url}"\npassword_file = "{home.secrets / "redis"}"\n[worker]\ndevice = "cpu"\n'
            f'[store]\nendpoint = "http://127.0.0.1:9"\ncredentials_file = "{home.secrets / "s3"}"\n'
        )

        def folders() -> list[Path]:
            return list(temporary.glob("edif-hpc-worker-*"))

        with worker(home, temporary):
            eventually(lambda: list(temporary.glob(f"*/{OWNER}")), 60.0, "the first worker's folder")
            left = folders()
        assert folders() == left
        with worker(home, temporary):
            eventually(lambda: folders() and folders() != left, 60.0, "the second worker's folder")
            assert len(folders()) == 1
