"""Workers as processes of their own, started by the command line against a real Redis, to see how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.home import Home


def prepared(root: Path, redis: RedisEndpoint, models: str = "") -> Home:
    """A home whose workers reach this Redis, and a store that nobody listens at; `models` belongs to `[models]`."""
    home = Home(root).create()
    home.write_private(home.secrets / "redis", redis.password)
    home.write_private(home.secrets / "s3", "a\ns\n")
    home.config.write_text(
        f'[redis]\nurl = "{redis.url}"\npassword_file = "{home.secrets / "redis"}"\n[worker]\ndevice = "cpu"\n'
        f'[store]\nendpoint = "http://127.0.0.1:9"\ncredentials_file = "{home.secrets / "s3"}"\n[models]\n{models}'
    )
    return home


@contextmanager
def worker(home: Home, temporary: Path, name: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A worker by the command line with this TMPDIR, killed at the end."""
    command = [sys.executable, "-m", "edif_hpc.cli", "worker", "--home", str(home.root)]
    command += ["--id", name] if name else []
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDIF_HPC_")}
    with (home.logs / "worker.log").open("a") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env={**kept, "TMPDIR": str(temporary)})
    try:
        yield started
    finally:
        started.kill()
        started.wait()
