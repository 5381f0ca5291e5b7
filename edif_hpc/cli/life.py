"""`up` and `down`: bring a home's components up, keep them running, and stop them all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .context import ConfigOption, HomeOption, locate, refusals, settings_for, working

if TYPE_CHECKING:
    from edif_hpc.core.home import Home
    from edif_hpc.core.settings import Settings

CONTAINER = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
"""Set inside, by Apptainer and what it was called before."""
UP_HELP = """Start Redis, the object store, the gateway and the fleet, and keep them running.

Run again on a running home it starts what is missing and leaves the rest alone.

Examples:

  edif-hpc up --detach

  edif-hpc up --port 8080 --isolation process --config site.toml
"""
DOWN_HELP = """Stop every component of the home, in order: fleet, workers (drained), gateway, store, Redis.

Allocations are cancelled, unless they are to be kept: their workers then serve on when the service is up again, and end
if that takes longer than worker.offline_seconds (10 minutes).

Examples:

  edif-hpc down --home /scratch/me/edif

  edif-hpc down --keep-allocations
"""


RESTART_HELP = """Replace the gateway without losing a request: a new one takes over its port, with today's settings.

The old one takes no more connections and serves those that it has to their end; `ps` shows it as draining.

Example:

  edif-hpc restart gateway
"""


def register(app: typer.Typer) -> None:
    app.command("up", help=UP_HELP)(up)
    app.command("down", help=DOWN_HELP)(down)
    app.command("restart", help=RESTART_HELP)(restart)
    app.command("supervise", hidden=True)(supervise)


@refusals
def up(
    home: HomeOption = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once the gateway answers.")] = False,
    host: Annotated[str | None, typer.Option(help="Address the gateway listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port the gateway listens on.")] = None,
    config: ConfigOption = None,
    isolation: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="none, process or locked (default: the strongest offered).")
    ] = None,
) -> None:
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.fleet import ahead, process, state
    from edif_hpc.fleet.supervise import SUPERVISOR
    from edif_hpc.fleet.up import check, poke, turn, wait_ready
    from edif_hpc.fleet.up import detach as start_detached

    if detach and any(name in os.environ for name in CONTAINER):
        raise ComponentError(
            "This runs from an image, which is gone for whatever is left behind when the command ends: run `up` "
            "without --detach, as a systemd --user unit or in tmux."
        )
    place = locate(home, create=True)
    options: dict[str, Any] = {
        "gateway": {name: value for name, value in (("host", host), ("port", port)) if value is not None},
        "worker": {"isolation": isolation} if isolation else {},
    }
    with working("Waiting for another `up` or `down` of this home …"):
        lock = turn(place)
    running = lock is None or any(record.alive for record in process.records(place))
    loaded = _loaded(place, config, options, running)
    settings = loaded.settings
    if lock is None:
        check(place, settings)
        poke(place)
        with working("Waiting for the gateway …"):
            wait_ready(place, settings)
        supervisor = process.living(place, SUPERVISOR)
        if supervisor is None:
            raise ComponentError(f"The home {place.root} was stopped in this moment; run `edif-hpc up` again.")
        _announce(place, settings, f"Running already (supervisor {supervisor.pid}).")
        return
    check(place, settings)
    if not running:
        ahead.refuse_silent_servers(place, settings)
        state.remember_up(place, config, loaded)
    state.write_failures(place, {})
    if not detach:
        _in_foreground(place, settings)
        return
    start_detached(place, lock)
    os.close(lock)
    _wait_or_stop(place, settings, running)
    _announce(place, settings, "Up.")


def _loaded(place: Home, config: Path | None, options: dict[str, Any], running: bool) -> Any:
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.core.settings import load
    from edif_hpc.fleet import state

    given = {section: values for section, values in options.items() if values}
    if not running:
        state.forget_up(place)
        return load(config or place.config, given, must_exist=config is not None)
    present = settings_for(place)
    wanted = settings_for(place, config, given)
    if wanted.settings != present.settings:
        raise ComponentError(
            f"The home {place.root} runs with other settings; run `edif-hpc down` before giving it new ones."
        )
    return present


def _wait_or_stop(place: Home, settings: Settings, running: bool) -> None:
    """Wait for the gateway. What cannot come up is taken down again, unless it was running before."""
    from edif_hpc.core.errors import EdifError
    from edif_hpc.fleet.up import down as stop
    from edif_hpc.fleet.up import wait_ready

    with working("Starting …") as say:
        try:
            wait_ready(place, settings)
        except (EdifError, KeyboardInterrupt):
            if not running:
                stop(place, say)
            raise


def _in_foreground(place: Home, settings: Settings) -> None:
    from edif_hpc.fleet.up import supervise as keep_running

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    keep_running(place, settings, tell, lambda: _announce(place, settings, "Up; Ctrl-C stops it."))


def _announce(place: Home, settings: Settings, first: str) -> None:
    from edif_hpc.fleet.state import gateway_url

    given = "" if place.root == type(place).locate().root else f" --home {place.root}"
    url = gateway_url(settings)
    print(f"{first} The gateway answers at {url}", flush=True)
    print(f"Next:  export NDIF_HOST={url}   and run your nnsight script with remote=True", flush=True)
    print(f"       edif-hpc ps{given}   |   edif-hpc logs gateway{given}   |   edif-hpc down{given}", flush=True)


@refusals
def supervise(home: HomeOption = None) -> None:
    """Keep the components of a home running; started by `up --detach`, which hands over the lock."""
    from edif_hpc.core import log
    from edif_hpc.fleet.up import supervise as keep_running

    place = locate(home)
    settings = settings_for(place).settings
    log.configure("supervisor", settings.log_level)
    logger = log.get("fleet")
    keep_running(place, settings, lambda line: logger.info(line))


@refusals
def down(
    home: HomeOption = None,
    keep_allocations: Annotated[
        bool, typer.Option("--keep-allocations", help="Leave the home's Slurm allocations running.")
    ] = False,
) -> None:
    from edif_hpc.fleet.up import down as stop

    place = locate(home)
    with working("Stopping …") as say:
        killed = stop(place, say, keep_allocations=keep_allocations)
    print("Down." if not killed else f"Down; killed: {', '.join(killed)}.")


@refusals
def restart(
    component: Annotated[str, typer.Argument(metavar="COMPONENT", help="gateway")],
    home: HomeOption = None,
) -> None:
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.fleet.supervise import GATEWAY
    from edif_hpc.fleet.takeover import restart as replace

    if component != GATEWAY:
        raise ComponentError(
            f"Only the gateway can be replaced while the service runs, not {component!r}: workers are replaced with "
            "`edif-hpc pool drain`, everything else with `edif-hpc down` and `edif-hpc up`."
        )
    place = locate(home)
    with working("Waiting for the new gateway …"):
        old, new = replace(place, settings_for(place).settings)
    left = f" The old one (pid {old.pid}) serves its connections to their end." if old.alive else ""
    print(f"A new gateway serves (pid {new.pid}).{left}")
