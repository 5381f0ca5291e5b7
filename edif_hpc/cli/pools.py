"""`pool list|show|script|stop|drain|resume` and `allocations`: the admin's view of what runs where, and the brake."""

from __future__ import annotations

import json as json_module
import time
from typing import TYPE_CHECKING, Annotated

import typer

from .context import ConfigOption, HomeOption, JsonOption, glance, locate, refusals, settings_for, table

if TYPE_CHECKING:
    from edif_hpc.core.home import Home
    from edif_hpc.core.pools import Pool
    from edif_hpc.core.registry import WorkerRecord
    from edif_hpc.core.settings import Settings
    from edif_hpc.fleet.health import Health

LIST_HELP = """List the pools, what each asks for and what it runs now.

Example:

  edif-hpc pool list --json
"""
SHOW_HELP = """Show everything about one pool, defaults included.

Example:

  edif-hpc pool show helma
"""
SCRIPT_HELP = """Print the sbatch script that a worker of this pool is submitted with. Nothing is submitted.

Example:

  edif-hpc pool script helma
"""
STOP_HELP = """Let a pool's workers end what they run, cancel its pending allocations, and start no more.

Example:

  edif-hpc pool stop helma
"""
START_HELP = """Start one worker of a pool now, up to its `max_workers`, also when no request waits.

Example:

  edif-hpc pool start helma
"""
DRAIN_HELP = """Let a pool's workers end what they run and leave; new ones start when requests ask for them.

Example:

  edif-hpc pool drain helma
"""
RESUME_HELP = """Let a pool start workers again that was stopped, that is held since somebody cancelled one of its
allocations, or that paused because its workers died young.

Example:

  edif-hpc pool resume helma
"""
ALLOCATIONS_HELP = """List this home's allocations as Slurm sees them: one `squeue`.

Example:

  edif-hpc allocations --json
"""

pool_app = typer.Typer(help="Pools: the kinds of allocations that workers run in.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The pool's name.")]


def register(app: typer.Typer) -> None:
    pool_app.command("list", help=LIST_HELP)(list_pools)
    pool_app.command("show", help=SHOW_HELP)(show)
    pool_app.command("script", help=SCRIPT_HELP)(script)
    pool_app.command("start", help=START_HELP)(start)
    pool_app.command("drain", help=DRAIN_HELP)(drain)
    pool_app.command("stop", help=STOP_HELP)(stop)
    pool_app.command("resume", help=RESUME_HELP)(resume)
    app.add_typer(pool_app, name="pool")
    app.command("allocations", help=ALLOCATIONS_HELP)(allocations)


@refusals
def list_pools(home: HomeOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    from edif_hpc.fleet.health import Health
    from edif_hpc.fleet.pools import pools_of

    place = glance(home)
    pools = pools_of(settings_for(place, config).settings)
    workers = _workers(place)
    braked, health = _braked(place), _health(place)
    rows = [
        {
            "name": pool.name,
            "launcher": pool.launcher,
            "accelerator": pool.accelerator,
            "time": pool.time if pool.launcher == "slurm" else "",
            "workers": sum(worker.pool == pool.name for worker in workers.values()),
            "launched": health.get(pool.name, Health()).launched,
            "pending": health.get(pool.name, Health()).pending,
            "paused": health.get(pool.name, Health()).paused,
            "min": pool.min_workers,
            "max": pool.max_workers,
            "models": pool.models if json else " ".join(pool.models),
            "state": braked.get(pool.name) or _state(health.get(pool.name, Health())),
        }
        for pool in pools
    ]
    columns = ("name", "launcher", "accelerator", "time", "workers", "launched", "min", "max", "models", "state")
    table("Pools", {name: name.upper() for name in columns}, rows, json=json)


@refusals
def show(name: NameArgument, home: HomeOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    pool = _find(settings_for(glance(home), config).settings, name)
    values = pool.model_dump(mode="json")
    if json:
        print(json_module.dumps(values, indent=2))
        return
    given = pool.model_fields_set
    rows = [
        {"key": key, "value": json_module.dumps(value), "origin": "settings" if key in given else "default"}
        for key, value in values.items()
    ]
    table("Keys", {"key": "KEY", "value": "VALUE", "origin": "ORIGIN"}, rows, json=False)


@refusals
def script(name: NameArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    from edif_hpc.core.errors import SettingsError
    from edif_hpc.fleet.slurm import names, order
    from edif_hpc.fleet.slurm.script import script as text

    place = glance(home)
    pool = _find(settings_for(place, config).settings, name)
    if pool.launcher != "slurm":
        raise SettingsError(f"The pool {name} starts processes on this machine; there is no script for it.")
    print(text(pool, names.first(place.root, name), order.folder(place.root)))


@refusals
def start(name: NameArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.fleet.brake import start as launch

    from .redis import with_redis

    place = locate(home)
    pool = _find(settings_for(place, config).settings, name)
    running = sum(worker.pool == name for worker in _workers(place).values())
    seen = _health(place).get(name)
    running = max(running, seen.launched if seen else 0)
    if running >= pool.max_workers:
        raise ComponentError(
            f"The pool {name} may have {pool.max_workers} workers and has {running}, those that wait for Slurm "
            "included; raise its max_workers."
        )
    with_redis(place, lambda redis: launch(redis, name))
    print(f"A worker of the pool {name} is started; see `edif-hpc ps` and `edif-hpc status`.")


@refusals
def drain(name: NameArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    from edif_hpc.fleet.brake import drain as empty

    from .redis import with_redis

    place = locate(home)
    _find(settings_for(place, config).settings, name)
    told = with_redis(place, lambda redis: empty(redis, name))
    print(f"{told} workers of the pool {name} were told to end what they run and leave.")


@refusals
def stop(name: NameArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    from edif_hpc.fleet.brake import stop as halt

    from .redis import with_redis

    place = locate(home)
    _find(settings_for(place, config).settings, name)
    told = with_redis(place, lambda redis: halt(redis, name))
    print(f"The pool {name} starts no more workers; {told} that run were told to end.")
    print(f"Let it start again with:  edif-hpc pool resume {name}")


@refusals
def resume(name: NameArgument, home: HomeOption = None, config: ConfigOption = None) -> None:
    from edif_hpc.fleet.brake import resume as release

    from .redis import with_redis

    place = locate(home)
    _find(settings_for(place, config).settings, name)
    with_redis(place, lambda redis: release(redis, name))
    print(f"The pool {name} may start workers again.")


@refusals
def allocations(home: HomeOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    from edif_hpc.core.endpoints import redis_endpoint
    from edif_hpc.fleet.slurm import names, order
    from edif_hpc.fleet.slurm.books import books
    from edif_hpc.fleet.slurm.commands import Slurm

    from .show import duration, moment

    place = locate(home)
    settings = settings_for(place, config).settings
    workers = _workers(place)
    rows = []
    with books(lambda: redis_endpoint(place, settings)) as count:
        found = Slurm(settings.slurm, count).allocations()
    for seen in found:
        name = names.read(seen.name, place.root)
        if name is None:
            continue
        worker = workers.get(name.worker)
        left = seen.end - time.time() if seen.end else None
        report = order.read_report(place.root, name)
        rows.append(
            {
                "job": seen.job_id,
                "pool": name.pool,
                "lineage": name.lineage,
                "generation": name.generation,
                "state": seen.state.lower(),
                "reason": "" if seen.reason == "None" else seen.reason,
                "node": seen.nodes,
                "start": seen.start if json else moment(seen.start),
                "deadline": seen.end if json else moment(seen.end),
                "left": left if json else duration(left),
                "worker": worker.state if worker else "",
                "running": worker.running if worker else None,
                "models": len(worker.models) if worker else None,
                "restarts": report.restarts if report else None,
                "exit": report.status if report else None,
                "cause": report.cause if report else "",
            }
        )
    columns = (
        "job", "pool", "lineage", "generation", "state", "reason", "node", "start", "deadline", "left", "worker",
        "running", "models", "cause",
    )  # fmt: skip
    table("Allocations", {each: each.upper() for each in columns}, rows, json=json)


def _workers(place: Home) -> dict[str, WorkerRecord]:
    """Those that serve, by their ids; none while the service is down."""
    from edif_hpc.core.registry import Registry

    from .redis import with_redis_if_up

    none: list[WorkerRecord] = []
    return {each.worker_id: each for each in with_redis_if_up(place, lambda redis: Registry(redis).workers(), none)}


def _braked(place: Home) -> dict[str, str]:
    """Pools that people keep from starting workers, and how."""
    from edif_hpc.fleet.brake import HELD, STOPPED, held, stopped

    from .redis import with_redis_if_up

    none: set[str] = set()
    halted, waits = with_redis_if_up(place, stopped, none), with_redis_if_up(place, held, none)
    return {**dict.fromkeys(waits, HELD), **dict.fromkeys(halted, STOPPED)}


def _health(place: Home) -> dict[str, Health]:
    """What the fleet saw last of each pool."""
    from edif_hpc.fleet.health import read_health

    from .redis import with_redis_if_up

    none: dict[str, Health] = {}
    return with_redis_if_up(place, read_health, none)


def _state(health: Health) -> str:
    if health.paused:
        return "paused"
    return f"waits ({health.pending})" if health.pending else ""


def _find(settings: Settings, name: str) -> Pool:
    from edif_hpc.core.errors import SettingsError
    from edif_hpc.fleet.pools import pools_of

    pools = pools_of(settings)
    for pool in pools:
        if pool.name == name:
            return pool
    raise SettingsError(f"There is no pool {name!r}; there are: {', '.join(pool.name for pool in pools)}.")
