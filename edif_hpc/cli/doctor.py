"""`doctor`: can this machine run the service, and does it? One line per finding: ok, warning or failed, what to do."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import typer

from .context import HomeOption, JsonOption, refusals

if TYPE_CHECKING:
    from edif_hpc.core.home import Home
    from edif_hpc.core.settings import Settings

HELP = """Check this machine and this home. Exit code 1 when something failed.

Examples:

  edif-hpc doctor

  edif-hpc doctor --json
"""
FREE_BYTES = 5 * 1024**3
CLOCK_SECONDS = 2.0
PROBE_OBJECT = "doctor/probe"
PACKAGES = ("nnsight", "torch", "transformers", "redis", "boto3")
STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line. `advice` says what to do about a warning or a failure."""

    subject: str
    state: State
    found: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    app.command("doctor", help=HELP)(doctor)


@refusals
def doctor(home: HomeOption = None, json: JsonOption = False) -> None:
    from edif_hpc.core.home import Home

    findings = list(examine(Home.locate(home)))
    if json:
        import json as json_module

        print(json_module.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console(soft_wrap=True)
        for finding in findings:
            line = Text.assemble(
                (f"{finding.state:<8}", STYLES[finding.state]), f"{finding.subject:<13}", finding.found
            )
            if finding.advice:
                line.append(f" → {finding.advice}")
            console.print(line)
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def examine(home: Home) -> Iterator[Finding]:
    """Everything, in the order in which it would stop the service."""
    from edif_hpc.core.errors import EdifError

    from .context import settings_for

    yield from _versions()
    try:
        if home.root.exists():
            home.check()
        settings = settings_for(home).settings
    except EdifError as error:
        yield Finding("home", "failed", str(error))
        return
    yield Finding("home", "ok", str(home.root) if home.root.exists() else f"{home.root} (made by the first `up`)")
    machine, servers = (_binaries, _accelerator, _isolation, _ranks, _images, _network), (_components, _redis, _store)
    for check in (*machine, *servers, _gateway, _disk):
        yield from _guarded(check, home, settings)


def _guarded(check: Callable[[Home, Settings], Iterator[Finding]], home: Home, settings: Settings) -> Iterator[Finding]:
    """A check that is refused is a finding, not the end of the others."""
    from edif_hpc.core.errors import EdifError

    try:
        yield from check(home, settings)
    except EdifError as error:
        yield Finding(check.__name__.strip("_"), "failed", str(error))


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from edif_hpc import __version__

    python = platform.python_version()
    known = (3, 11) <= sys.version_info < (3, 14)
    yield Finding("edif-hpc", "ok", f"{__version__}, Python {python}, {platform.system()} {platform.release()}")
    if not known:
        yield Finding("python", "failed", python, "use Python 3.11 to 3.13")
    missing, present = [], []
    for name in PACKAGES:
        try:
            present.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    yield Finding("packages", "ok", ", ".join(present))
    if missing:
        yield Finding(
            "packages", "warning", f"not installed: {', '.join(missing)}",
            "workers on this machine need edif-hpc[worker]; a gateway does not",
        )  # fmt: skip


def _binaries(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.fleet import embedded

    wanted = [("redis-server", embedded.redis_binary, settings.redis.url)]
    wanted.append(("weed", embedded.store_binary, settings.store.endpoint))
    for name, find, external in wanted:
        if external:
            continue
        try:
            yield Finding(name, "ok", find())
        except ComponentError as error:
            yield Finding(name, "failed", "not found", str(error))


def _accelerator(home: Home, settings: Settings) -> Iterator[Finding]:
    if settings.worker.device == "cpu":
        yield Finding("accelerator", "ok", "not used (worker.device is cpu)")
        return
    from edif_hpc.hardware.detect import detect
    from edif_hpc.hardware.memory import gib

    machine = detect()
    if machine.devices:
        sizes = sorted({gib(device.memory_bytes) for device in machine.devices})
        names = sorted({device.name for device in machine.devices})
        modes = " ".join((*machine.partitions, *machine.memory_partitions))
        versions = " ".join(part for part in (f"driver {machine.driver}", machine.runtime, modes) if part)
        found = f"{len(machine.devices)} x {', '.join(names)}, {' or '.join(sizes)} each ({versions})"
        if len(machine.devices) > 1:
            found += f"; {gib(machine.spread_memory_bytes)} for a model that is spread, at isolation none"
        yield Finding("accelerator", "ok", f"{machine.profile.name}: {found}")
    else:
        yield Finding("accelerator", "ok", "none found on this machine: workers here use the CPU")
    for note in machine.notes:
        yield Finding("accelerator", "warning", note)


def _isolation(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.core.isolation import Isolation
    from edif_hpc.worker import sandbox

    reach = sandbox.probe()
    wanted = max(
        settings.worker.isolation or Isolation.NONE, settings.worker.required_isolation, key=lambda level: level.rank
    )
    state: State
    if not reach.level.covers(wanted):
        state, advice = "failed", f"{wanted} is demanded: {' '.join(reach.reasons)}"
    elif reach.level is not Isolation.LOCKED:
        state, advice = "warning", " ".join(reach.reasons)
    else:
        state, advice = "ok", ""
    used = settings.worker.isolation or reach.level
    yield Finding(
        "isolation", state,
        f"reaches {reach.level}, uses {used} (Landlock ABI {reach.landlock_abi or 'none'}, "
        f"seccomp {'yes' if reach.seccomp else 'no'})",
        advice,
    )  # fmt: skip


def _ranks(home: Home, settings: Settings) -> Iterator[Finding]:
    """Which models of the cache can be split as the settings want it; silent where nothing is split."""
    from edif_hpc.core.errors import ModelError
    from edif_hpc.hardware.checkpoint import list_models
    from edif_hpc.hardware.tensor_parallel import check_split

    from .models import cache_of

    ranks = settings.models.tensor_parallel
    if ranks == 1:
        return
    yield Finding("ranks", "ok", f"every model is split over {ranks} (models.tensor_parallel)")
    for checkpoint in list_models(cache_of(home, settings)):
        try:
            check_split(checkpoint, ranks)
        except ModelError as error:
            if not checkpoint.adapter:
                yield Finding("ranks", "warning", str(error))


def _images(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.fleet.ahead import missing

    for pool in settings.pool:
        if missing(pool):
            said = f"there is no {pool.image}, though its folder is here (pool.{pool.name}.image)"
            yield Finding("image", "failed", said, "build it with `edif-hpc image build`, or name another")


def _network(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.fleet.network import embeds, interface, refuse_loopback

    if not embeds(settings):
        yield Finding("network", "ok", "Redis and the object store are external")
        return
    refuse_loopback(settings)
    address = settings.network.address
    if not address:
        yield Finding("network", "ok", "loopback only: workers of this machine alone")
        return
    found = interface(address)
    as_what = "" if found == address else f", which is {found},"
    yield Finding("network", "ok", f"compute nodes reach Redis and the object store at {address}{as_what} over TLS")


def _components(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.fleet import process, state

    records = process.records(home) if home.run.exists() else []
    if not records:
        yield Finding("components", "warning", "nothing runs", "start it with `edif-hpc up`")
        return
    advice = "see `edif-hpc logs`; `edif-hpc up` starts what is missing"
    gone = [record.name for record in records if not record.alive]
    if gone:
        yield Finding("components", "failed", f"not running: {', '.join(gone)}", advice)
    else:
        yield Finding("components", "ok", ", ".join(record.name for record in records))
    for name, deaths in state.failures(home).items():
        yield Finding("components", "warning", f"{name} died {deaths} times lately", f"see `edif-hpc logs {name}`")


def _redis(home: Home, settings: Settings) -> Iterator[Finding]:
    from .context import locate
    from .redis import with_redis

    if not home.root.exists():
        return
    locate(home.root)

    async def ask(redis: Any) -> tuple[dict[str, Any], str | None, tuple[int, int], float]:
        return await redis.info(), await _save_points(redis), await redis.time(), time.time()

    info, saves, (seconds, micros), now = with_redis(home, ask)
    yield Finding("redis", "ok", f"version {info['redis_version']}, {info['used_memory_human']} used")
    if info.get("maxmemory_policy") not in (None, "noeviction"):
        yield Finding(
            "redis", "warning", f"it may drop requests when it is full (maxmemory-policy {info['maxmemory_policy']})",
            "set maxmemory-policy noeviction there",
        )  # fmt: skip
    yield _persistence(info, saves)
    if settings.redis.url.startswith("redis://") and any(pool.launcher == "slurm" for pool in settings.pool):
        advice = "use rediss:// where others share the network: passwords and payloads travel in plain text"
        yield Finding("redis", "warning", "workers reach it without TLS", advice)
    behind = abs(seconds + micros / 1e6 - now)
    if behind > CLOCK_SECONDS:
        yield Finding("clock", "warning", f"{behind:.1f} s away from Redis's", "synchronise this machine's clock (NTP)")
    else:
        yield Finding("clock", "ok", f"within {behind * 1000:.0f} ms of Redis's")


async def _save_points(redis: Any) -> str | None:
    """When it writes snapshots; None where we may not ask, as in the embedded one."""
    from redis.exceptions import ResponseError

    try:
        return str((await redis.config_get("save")).get("save", ""))
    except ResponseError:
        return None


def _persistence(info: dict[str, Any], saves: str | None) -> Finding:
    """What a restart of Redis leaves of the requests that were accepted."""
    if info.get("aof_enabled"):
        return Finding("redis", "ok", "keeps an append-only file")
    advice = "set appendonly yes there: what was accepted would be lost with a restart"
    if saves:
        return Finding("redis", "ok", f"keeps snapshots (save {saves}), and no append-only file")
    found = (
        "it keeps nothing over a restart"
        if saves is not None
        else "it keeps no append-only file, nor tells of snapshots"
    )
    return Finding("redis", "warning", f"{found} (appendonly no)", advice)


def _store(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.core.endpoints import store_endpoint
    from edif_hpc.core.store import Store

    if not home.root.exists():
        return
    store = Store(store_endpoint(home, settings))
    began = time.monotonic()
    store.ensure_bucket()
    store.put(PROBE_OBJECT, b"probe")
    store.get(PROBE_OBJECT)
    store.delete([PROBE_OBJECT])
    took = (time.monotonic() - began) * 1000
    yield Finding("store", "ok", f"{store.endpoint.endpoint}: wrote, read and deleted an object in {took:.0f} ms")


def _gateway(home: Home, settings: Settings) -> Iterator[Finding]:
    from edif_hpc.fleet.components import gateway_answers
    from edif_hpc.fleet.process import living
    from edif_hpc.fleet.state import gateway_url

    if not home.root.exists():
        return
    url = gateway_url(settings)
    answers = gateway_answers(settings)
    if answers and living(home, "gateway"):
        yield Finding("gateway", "ok", url)
    elif answers:
        yield Finding("gateway", "failed", f"{url} is somebody else's", "choose another port with `up --port`")
    else:
        yield Finding("gateway", "failed", f"{url} does not answer", "start it with `edif-hpc up`")


def _disk(home: Home, settings: Settings) -> Iterator[Finding]:
    from .models import cache_of
    from .show import size

    for name, path in (("home", home.root), ("model cache", cache_of(home, settings))):
        present = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(present).free
        enough = free >= FREE_BYTES
        yield Finding(
            "disk", "ok" if enough else "warning", f"{size(free)} free for the {name} at {present}",
            "" if enough else f"large results and models need room: keep {size(FREE_BYTES)} free",
        )  # fmt: skip
