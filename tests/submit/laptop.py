"""A researcher's own machine: a folder with scripts, an address and a key, and no home of the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.stack import EDIF_HPC

COMMAND_SECONDS = 120
NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['nnsight'] = None; from edif_hpc.cli.main import app; app()"
"""The command line where neither can be imported."""


@dataclass
class Laptop:
    folder: Path
    url: str
    key: str = field(repr=False)
    cache: Path
    level: str
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.folder),
            "EDIF_HPC_HOME": str(self.folder / "no-home"),
            "NDIF_HOST": self.url,
            "NDIF_API_KEY": self.key,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            **self.variables,
        }

    def write(self, source: str, name: str = "experiment.py") -> Path:
        file = self.folder / name
        file.write_text(textwrap.dedent(source))
        return file

    def run(self, *arguments: str | Path, without_torch: bool = False) -> subprocess.CompletedProcess[str]:
        """One command of `edif-hpc`, whatever its exit code."""
        command = [sys.executable, "-c", NO_TORCH] if without_torch else [str(EDIF_HPC)]
        return subprocess.run(
            [*command, *map(str, arguments)], env=self.environment(), cwd=self.folder, capture_output=True, text=True,
            timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """The same, not waited for, in a session of its own as a terminal's is."""
        return subprocess.Popen(
            [str(EDIF_HPC), *map(str, arguments)], env=self.environment(), cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def submit(self, source: str, *options: str | Path, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
        """Submit a script and wait for its end, which must come with this exit code."""
        done = self.run("submit", self.write(source), "--follow", *options, **more)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def prints(self, source: str, *options: str | Path) -> list[str]:
        """What a script printed that came to a good end: the first line is the request's id."""
        return self.submit(source, *options).stdout.splitlines()[1:]

    def python(self, file: Path, *arguments: str) -> str:
        """Run a script here; returns what it prints."""
        done = subprocess.run(
            [sys.executable, str(file), *arguments], env=self.environment(), cwd=self.folder, capture_output=True,
            text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shown(self, request_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", request_id, "--json").stdout)
        return found
