"""What a running home remembers beside its components: who supervises it, what `up` was told, what keeps failing."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from edif_hpc.core.home import Home
from edif_hpc.core.settings import Loaded, Settings, load

UP = "up.json"
FAILURES = "failures.json"
LOCK = "supervisor.lock"


def lock(home: Home) -> int | None:
    """Become this home's supervisor: a descriptor that holds the lock as long as any process has it, or None.

    It is a lock on the open file, so it can be handed to a child without a moment in which nobody holds it.
    """
    descriptor = os.open(home.run / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def supervised(home: Home) -> bool:
    descriptor = lock(home)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def remember_up(home: Home, config: Path | None, loaded: Loaded) -> None:
    """Keep the file, and every value that did not come from it: they hold until `down`, in every shell."""
    overrides: dict[str, Any] = {}
    origins: dict[str, str] = {}
    values = loaded.settings.model_dump(mode="json")
    for key, origin in loaded.origins.items():
        if origin == str(config or home.config):
            continue
        *sections, name = key.split(".")
        source, target = values, overrides
        for section in sections:
            source, target = source[section], target.setdefault(section, {})
        target[name] = source.get(name)
        origins[key] = origin
    remembered = {"config": str(config or ""), "overrides": overrides, "origins": origins}
    home.write_private(home.run / UP, json.dumps(remembered))


def forget_up(home: Home) -> None:
    (home.run / UP).unlink(missing_ok=True)


def settings_of(home: Home, config: Path | None = None, overrides: dict[str, Any] | None = None) -> Loaded:
    """The settings of a home: those its `up` was given while it runs, else those of its file and the environment."""
    up = _remembered(home)
    chosen = config or config_of(home)
    loaded = load(chosen or home.config, merged(up["overrides"], overrides or {}), must_exist=chosen is not None)
    remembered = {key: origin for key, origin in up["origins"].items() if not _holds(overrides, key)}
    return Loaded(settings=loaded.settings, origins={**loaded.origins, **remembered})


def config_of(home: Home) -> Path | None:
    """The settings file that `up` was given, while it runs; None for the home's own."""
    given = _remembered(home)["config"]
    return Path(given) if given else None


def _remembered(home: Home) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((home.run / UP).read_text())
    except FileNotFoundError:
        return {"config": "", "overrides": {}, "origins": {}}
    return found


def _holds(values: Any, key: str) -> bool:
    """Whether nested values name this dotted key."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; the second wins."""
    result = dict(below)
    for name, value in above.items():
        inner = result.get(name)
        result[name] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return result


def write_failures(home: Home, failures: dict[str, int]) -> None:
    """How often each component died in a row, for whoever waits for `up`."""
    home.write_private(home.run / FAILURES, json.dumps(failures))


def failures(home: Home) -> dict[str, int]:
    try:
        found: dict[str, int] = json.loads((home.run / FAILURES).read_text())
    except FileNotFoundError:
        return {}
    return found


def gateway_url(settings: Settings) -> str:
    """Where processes of this machine reach the gateway."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - looked up, not bound
    host = everywhere.get(settings.gateway.host, settings.gateway.host)
    return f"http://{host}:{settings.gateway.port}"
