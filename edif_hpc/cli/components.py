"""`gateway`, `fleet` and `worker`: one component in the foreground, for systemd, images and batch scripts."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .context import ConfigOption, HomeOption, locate, refusals, settings_for

if TYPE_CHECKING:
    from edif_hpc.core.home import Home

GATEWAY_HELP = """Run the gateway in the foreground.

Examples:

  edif-hpc gateway --home /scratch/me/edif

  edif-hpc gateway --home /scratch/me/edif --takeover
"""
FLEET_HELP = """Run the fleet in the foreground: it starts workers when requests ask for a model.

Example:

  edif-hpc fleet --config site.toml
"""
WORKER_HELP = """Run one worker in the foreground: it takes requests and runs them.

Example:

  edif-hpc worker --home /scratch/me/edif --pool local
"""

HANDOVERS = ("overlap", "requeue")


def register(app: typer.Typer) -> None:
    app.command("gateway", help=GATEWAY_HELP)(gateway)
    app.command("fleet", help=FLEET_HELP)(fleet)
    app.command("worker", help=WORKER_HELP)(worker)


@refusals
def gateway(
    home: HomeOption = None,
    config: ConfigOption = None,
    takeover: Annotated[
        bool,
        typer.Option(
            "--takeover",
            help="Share the port with the gateway of this home that runs, and let that one drain: it takes no more "
            "connections and ends after its last socket. Not for a home that `up` keeps running.",
        ),
    ] = False,
) -> None:
    from edif_hpc.fleet.process import forget_own, living, recorded
    from edif_hpc.fleet.state import gateway_url
    from edif_hpc.fleet.supervise import GATEWAY, SUCCESSOR
    from edif_hpc.fleet.takeover import is_successor, take_over
    from edif_hpc.fleet.versions import refuse_running, refuse_versions
    from edif_hpc.gateway.main import serve

    place = locate(home)
    settings = settings_for(place, config).settings
    old, url = living(place, GATEWAY) if takeover else None, gateway_url(settings)
    if old is None:
        refuse_running(place, GATEWAY)
    elif not is_successor(place):
        _refuse_supervised(place)
        refuse_running(place, SUCCESSOR)
    refuse_versions(place, settings, GATEWAY)

    def serving() -> None:
        if old:
            take_over(place, old, url)

    with recorded(place, SUCCESSOR if old else GATEWAY, url):
        try:
            serve(place, settings, takeover=old is not None, accepting=serving)
        finally:
            forget_own(place)


def _refuse_supervised(place: Home) -> None:
    """Its supervisor would take the end of the old gateway for a death, and start a third."""
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.fleet.state import supervised

    if supervised(place):
        raise ComponentError(
            f"The gateway of {place.root} is kept running by `edif-hpc up`: `edif-hpc restart gateway` replaces it. "
            "--takeover is for gateways started by hand."
        )


@refusals
def fleet(home: HomeOption = None, config: ConfigOption = None) -> None:
    from edif_hpc.fleet.main import serve
    from edif_hpc.fleet.process import recorded
    from edif_hpc.fleet.state import config_of
    from edif_hpc.fleet.versions import refuse_running, refuse_versions

    place = locate(home)
    settings = settings_for(place, config).settings
    refuse_running(place, "fleet")
    refuse_versions(place, settings, "fleet")
    with recorded(place, "fleet"):
        serve(place, settings, config or config_of(place))


@refusals
def worker(
    home: HomeOption = None,
    config: ConfigOption = None,
    name: Annotated[str, typer.Option("--id", metavar="ID", help="The worker's name (default: a random one).")] = "",
    pool: Annotated[str, typer.Option(help="The pool it belongs to.")] = "local",
    deadline: Annotated[
        float | None,
        typer.Option(metavar="TIME", help="When it must have ended, in Unix seconds (default: never)."),
    ] = None,
    lineage: Annotated[str, typer.Option(metavar="ID", help="The chain of allocations it is part of.")] = "",
    generation: Annotated[int, typer.Option(min=1, metavar="N", help="Its place in that chain.")] = 1,
    supervisor: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the pipes to who submits its successor (see slurm/README.md)."),
    ] = None,
    handover: Annotated[
        str, typer.Option(metavar="MODE", help="How that successor starts: overlap (beside it) or requeue (after it).")
    ] = "overlap",
) -> None:
    import secrets

    from edif_hpc.core.endpoints import Role
    from edif_hpc.core.errors import SettingsError
    from edif_hpc.fleet.process import recorded
    from edif_hpc.fleet.versions import refuse_running, refuse_versions
    from edif_hpc.worker.handover import Chain
    from edif_hpc.worker.main import leave, serve

    place = locate(home)
    settings = settings_for(place, config).settings
    if bool(lineage) != bool(supervisor):
        raise SettingsError("--lineage and --supervisor go together: one names the chain, the other who continues it.")
    if handover not in HANDOVERS:
        raise SettingsError(f"--handover is {handover!r}; it is one of: {', '.join(HANDOVERS)}.")
    worker_id = name or f"worker-{secrets.token_hex(3)}"
    refuse_running(place, worker_id)
    refuse_versions(place, settings, worker_id, Role.WORKER)
    allocated = any(each.name == pool and each.launcher == "slurm" for each in settings.pool)
    # In an allocation it is Slurm that knows the process; a record would make its node one that has the home in use.
    with nullcontext() if allocated else recorded(place, worker_id):
        overlap = handover == "overlap"
        chain = Chain(lineage, generation, _job_id(), supervisor, overlap) if supervisor else None
        serve(place, settings, worker_id=worker_id, pool=pool, deadline=deadline, chain=chain)
    leave()


def _job_id() -> str:
    from edif_hpc.core.errors import ComponentError

    job_id = os.environ.get("SLURM_JOB_ID", "")
    if not job_id:
        raise ComponentError(
            "--supervisor is for allocations, and SLURM_JOB_ID is not set; pass it into the container."
        )
    return job_id
