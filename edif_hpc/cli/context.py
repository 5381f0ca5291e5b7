"""What every command shares: the home it works on, its settings, and how a refusal ends it."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from edif_hpc.core.home import Home
    from edif_hpc.core.settings import Loaded

AWAY = 4
"""The exit code of a command for which a service does not answer: the same one may do a little later."""
F = TypeVar("F", bound=Callable[..., Any])


def _absolute(path: Path | None) -> Path | None:
    """What components run from is another folder than the command's."""
    return path.expanduser().absolute() if path else None


HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="The home to work on (default: EDIF_HPC_HOME, else ~/.edif-hpc)."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_absolute,
        help="Settings file (default: edif-hpc.toml in the home).",
    ),
]
WIDE = 200
"""Columns of a table that goes into a file or a pipe, where there is no terminal to fit."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def locate(home: Path | None, *, create: bool = False) -> Home:
    """The home a command was given, checked; made when it may be."""
    from edif_hpc.core.home import Home

    found = Home.locate(home)
    if create:
        return found.create()
    found.check()
    return found


def glance(home: Path | None) -> Home:
    """The home of a command that only reads settings: it need not exist yet."""
    from edif_hpc.core.home import Home

    found = Home.locate(home)
    if found.root.exists():
        found.check()
    return found


def settings_for(home: Home, config: Path | None = None, overrides: dict[str, Any] | None = None) -> Loaded:
    from edif_hpc.fleet.state import settings_of

    return settings_of(home, config, overrides)


def refusals(function: F) -> F:
    """End a command whose work was refused with one sentence on stderr and exit code 1, or `AWAY`."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        from edif_hpc.core.errors import EdifError, Unavailable

        try:
            return function(*args, **kwargs)
        except EdifError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(AWAY if isinstance(error, Unavailable) else 1) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None

    # It has the same parameters, which Typer reads through __wrapped__; mypy cannot see that of *args.
    return guarded  # type: ignore[return-value]  # see above


def table(title: str, columns: dict[str, str], rows: list[dict[str, Any]], *, json: bool, empty: str = "") -> None:
    """Print rows as a table, or as JSON with every field. `columns`: field -> heading."""
    if json:
        print(json_module.dumps(rows, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(empty or f"No {title.lower()}.")
        return
    sheet = Table(title=None, header_style="bold", box=None, pad_edge=False)
    for heading in columns.values():
        sheet.add_column(heading, overflow="fold")
    for row in rows:
        sheet.add_row(*("" if row.get(field) is None else str(row[field]) for field in columns))
    Console(width=None if sys.stdout.isatty() else WIDE).print(sheet)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something goes on: a spinner with the latest line on a terminal, the lines themselves elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    with console.status(what) as status:

        def say(line: str) -> None:
            console.print(line, style="dim", markup=False, highlight=False)
            status.update(what)

        yield say
