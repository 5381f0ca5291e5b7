"""`image build|check`: the Apptainer images that workers run in."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import Annotated

import typer

from .context import JsonOption, refusals

BUILD_HELP = """Build an image from this checkout, without root: cpu, cuda, rocm (workers) or gateway.

Debian's packages come from the mirror in this machine's apt configuration, Python's from where its pip looks.

Examples:

  edif-hpc image build cpu

  edif-hpc image build cuda --out /scratch/images/worker-cuda.sif --arg base=pytorch/pytorch:TAG
"""
CHECK_HELP = """Run an image's own test and show its labels.

Example:

  edif-hpc image check worker-cpu.sif
"""

image_app = typer.Typer(help="Images: what workers run in on a cluster.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    image_app.command("build", help=BUILD_HELP)(build)
    image_app.command("check", help=CHECK_HELP)(check)
    app.add_typer(image_app, name="image")


@refusals
def build(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="cpu, cuda, rocm or gateway.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where it goes (default: worker-KIND.sif here).")
    ] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A build argument of the definition; repeatable.")
    ] = None,
    json: JsonOption = False,
) -> None:
    from edif_hpc.core.errors import SettingsError
    from edif_hpc.fleet import images

    if kind not in images.KINDS:
        raise SettingsError(f"There is no image of the kind {kind!r}; there are: {', '.join(images.KINDS)}.")
    arguments = dict(pair.partition("=")[::2] for pair in arg or [])
    if wrong := [pair for pair in arg or [] if "=" not in pair]:
        raise SettingsError(f"--arg {wrong[0]!r} is not of the form NAME=VALUE.")
    name = f"{'' if kind == 'gateway' else 'worker-'}{kind}.sif"
    began = time.monotonic()
    built = images.build(kind, (out or Path(name)).absolute(), arguments, lambda words: _tell(words, began, json))
    if json:
        print(json_module.dumps({**vars(built), "image": str(built.image)}, indent=2))
        return
    print(f"{built.image}  {built.bytes / 1024**2:.0f} MiB")
    print("took " + ", ".join(f"{seconds:.0f} s for the {step}" for step, seconds in built.seconds.items()))
    _print_labels(built.labels)


@refusals
def check(image: Annotated[Path, typer.Argument(metavar="FILE")], json: JsonOption = False) -> None:
    from edif_hpc.fleet import images

    labels = images.labels(image)
    said = images.test(image)
    if json:
        print(json_module.dumps({"image": str(image), "labels": labels, "test": said.strip()}, indent=2))
        return
    print(said.strip())
    _print_labels(labels)


def _tell(words: str, began: float, json: bool) -> None:
    typer.echo(f"{time.monotonic() - began:4.0f} s  {words}", err=json)


def _print_labels(labels: dict[str, str]) -> None:
    for name, value in labels.items():
        if name.startswith("org.edif-hpc."):
            print(f"  {name.removeprefix('org.edif-hpc.')}: {value}")
