"""The command `edif-hpc`: one Typer app. Commands import what they need when they run, so that `--help` stays quick."""

from __future__ import annotations

import typer

from . import (
    components,
    config,
    doctor,
    images,
    keys,
    life,
    logs,
    look,
    methods,
    models,
    pools,
    requests,
    result,
    submit,
)

app = typer.Typer(
    name="edif-hpc",
    help="Remote nnsight experiments on HPC clusters: a service without root, Docker or inbound ports.",
    epilog="First steps:  edif-hpc up --detach,  edif-hpc models pull REPO,  edif-hpc ps,  edif-hpc down",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

for module in (
    life, look, submit, methods, logs, requests, result, models, pools, images, keys, config, doctor, components
):  # fmt: skip
    module.register(app)


def version(value: bool) -> None:
    if value:
        from edif_hpc import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
) -> None:
    pass
