"""A whole service in a home of its own, started and stopped by the real `edif-hpc`, as an ordinary user.

As root many tests prove nothing: limits do not bind and files of others open. So when the tests run as root, the
service runs as an unprivileged uid that owns nothing but its home, provided that uid can read this checkout.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import device
from .servers import free_port

EDIF_HPC = Path(sys.executable).parent / "edif-hpc"
ORDINARY_UID = 61234
"""An unprivileged uid without an account: nothing on the machine belongs to it."""
UP_SECONDS = 90


@functools.cache
def ordinary_uid() -> int | None:
    """The uid that services run as when the tests run as root; None when they run as ourselves."""
    if os.geteuid() != 0:
        return None
    probe = subprocess.run(
        [sys.executable, "-c", "import edif_hpc, torch"], user=ORDINARY_UID, group=ORDINARY_UID, extra_groups=[],
        cwd="/", capture_output=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        sys.stderr.write("tests run as root, and an ordinary user cannot read this checkout: services run as root\n")
        return None
    return ORDINARY_UID


@dataclass
class Stack:
    """A running service. `key` belongs to the user "tester"."""

    home: Path
    url: str
    key: str = field(repr=False, default="")
    uid: int | None = None
    level: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment of every command, and so of all that `up` starts."""
    keys: dict[str, str] = field(default_factory=dict, repr=False)

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            **device.environment(),
            "HOME": str(self.home),
            "USER": "ordinary",
            "PYTHONWARNINGS": "default",
            **self.variables,
            **extra,
        }

    def cli(self, *arguments: str, check: bool = True, timeout: float = UP_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run one `edif-hpc` command on this home, as the service's user."""
        identity: dict[str, Any] = {"user": self.uid, "group": self.uid, "extra_groups": []} if self.uid else {}
        done = subprocess.run(
            [str(EDIF_HPC), arguments[0], *arguments[1:], "--home", str(self.home)],
            env=self.environment(), cwd="/", capture_output=True, text=True, timeout=timeout, check=False, **identity,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"edif-hpc {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json").stdout)

    def logs(self) -> str:
        """The ends of all logs, for a failing test."""
        found = sorted((self.home / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in found)


def passable(path: Path) -> None:
    """Let other users walk to a path: pytest's own folders are 0700."""
    for parent in path.parents:
        mode = parent.stat().st_mode
        if parent.stat().st_uid == os.geteuid() and not mode & 0o001:
            parent.chmod(mode | 0o011)


def prepared(home: Path, cache: Path, settings: str = "", *, gateway: str = "", as_ordinary_user: bool = True) -> Stack:
    """A home ready for `up`, on `cache` (a hub cache directory), owned by whom the service will run as.

    `settings` is TOML; what comes before its first section belongs to `[models]`. `gateway` is what belongs to
    `[gateway]`, which has a port already.
    """
    # On AMD /dev/kfd is open to a group that this uid is not in.
    uid = ordinary_uid() if as_ordinary_user and device.on_cpu() else None
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    port = free_port()
    (home / "edif-hpc.toml").write_text(
        f'[gateway]\nport = {port}\n{gateway}\n[models]\ncache = "{cache}"\n{device.settings(settings)}'
    )
    if uid is not None:
        for path in (home, *home.rglob("*")):
            os.chown(path, uid, uid)
        for path in (home, cache):
            passable(path)
    return Stack(home, f"http://127.0.0.1:{port}", uid=uid)


@contextmanager
def running(
    home: Path,
    cache: Path,
    isolation: str = "locked",
    settings: str = "",
    *,
    gateway: str = "",
    variables: dict[str, str] | None = None,
    as_ordinary_user: bool = True,
) -> Iterator[Stack]:
    """Start a service in a home of its own, stop it at the end, whatever happened; see `prepared`."""
    stack = prepared(home, cache, settings, gateway=gateway, as_ordinary_user=as_ordinary_user)
    stack.variables = variables or {}
    try:
        stack.cli("up", "--detach", "--isolation", isolation)
        stack.key = stack.json("keys", "create", "tester")["key"]
        yield stack
    finally:
        passable(home)  # another pytest of this user that starts meanwhile closes the folders of all
        stack.cli("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def client_of(stack: Stack) -> Iterator[None]:
    """Point this process's stock nnsight at a service, and back."""
    from nnsight.schema.config import CONFIG

    before = CONFIG.API.HOST, CONFIG.API.APIKEY, CONFIG.APP.REMOTE_LOGGING
    CONFIG.API.HOST, CONFIG.API.APIKEY, CONFIG.APP.REMOTE_LOGGING = stack.url, stack.key, False
    try:
        yield
    finally:
        CONFIG.API.HOST, CONFIG.API.APIKEY, CONFIG.APP.REMOTE_LOGGING = before
