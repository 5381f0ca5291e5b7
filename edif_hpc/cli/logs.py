"""`logs`: what a component wrote, or what happened to a request."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .context import HomeOption, refusals

if TYPE_CHECKING:
    from edif_hpc.core.home import Home

LOGS_HELP = """Show the log of a component, the events of a request, or, without either, the end of every log.

Examples:

  edif-hpc logs gateway --follow

  edif-hpc logs worker-3f9a0c --lines 100

  edif-hpc logs 3fa85f64-5717-4562-b3fc-2c963f66afa6 -f
"""
POLL_SECONDS = 0.2
"""How often files are looked at again: several are followed at once, and shared file systems tell of no changes."""
WAIT_SECONDS = 20
TERMINAL = ("COMPLETED", "ERROR")
REQUEST = re.compile(r"[0-9a-f-]{32,36}")


def register(app: typer.Typer) -> None:
    app.command("logs", help=LOGS_HELP)(logs)


@refusals
def logs(
    of: Annotated[
        str, typer.Argument(metavar="[COMPONENT|REQUEST]", help="A component's name or a request's id.")
    ] = "",
    home: HomeOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more comes; Ctrl-C ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines from the end to begin with.")] = 200,
) -> None:
    from edif_hpc.core.errors import ComponentError
    from edif_hpc.core.home import Home

    place = Home.locate(home)
    files = sorted(place.logs.glob("*.log"))
    chosen = files if not of else [file for file in files if file.stem == of]
    try:
        if chosen:
            _components(chosen, follow, lines if of else min(lines, 20), named=not of)
        elif REQUEST.fullmatch(of):
            _request(place, of, follow)
        elif of:
            raise ComponentError(_unknown(of, files, place))
        else:
            print(f"Nothing has written a log in {place.root} yet.", file=sys.stderr)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _unknown(of: str, files: list[Path], home: Home) -> str:
    written = (
        f"There are {', '.join(file.stem for file in files)}." if files else "Nothing has written a log there yet."
    )
    return f"{of!r} is no request's id, and no component of that name has written a log in {home.root}. {written}"


def _components(files: list[Path], follow: bool, lines: int, *, named: bool) -> None:
    ends = {}
    for file in files:
        with file.open("rb") as opened:
            last = deque(opened, maxlen=lines)
            ends[file] = opened.tell()
        for old in last:
            _print(file, old.decode(errors="replace"), named)
    while follow:
        sys.stdout.flush()
        time.sleep(POLL_SECONDS)  # polled: nothing tells of a file's growth on every file system
        for file, end in ends.items():
            for line, at in _more(file, end):
                ends[file] = at
                _print(file, line, named)


def _more(file: Path, end: int) -> Iterator[tuple[str, int]]:
    """Whole lines after `end`; from the start again when the log was cut."""
    with file.open("rb") as opened:
        opened.seek(end if file.stat().st_size >= end else 0)
        for line in opened:
            if line.endswith(b"\n"):
                yield line.decode(errors="replace"), opened.tell()


def _print(file: Path, line: str, named: bool) -> None:
    text = readable(line.rstrip("\n"))
    print(f"{file.stem:<14} {text}" if named else text)


def readable(line: str) -> str:
    """A JSON line as a person reads it; any other line as it is."""
    try:
        fields = json.loads(line)
        stamp, level, event = fields.pop("timestamp"), fields.pop("level"), fields.pop("event")
    except (ValueError, KeyError, AttributeError, TypeError):
        return line
    for name in ("component", "room"):
        fields.pop(name, None)
    trouble = fields.pop("exception", None)
    rest = " ".join(f"{name}={value}" for name, value in fields.items())
    text = f"{stamp[:19].replace('T', ' ')} {level:<7} {event}{'  ' + rest if rest else ''}"
    return f"{text}\n{trouble}" if trouble else text


def _request(home: Home, request_id: str, follow: bool) -> None:
    from .http import Gateway

    gateway = Gateway(home)
    cursor = "0-0"
    while True:
        query: dict[str, Any] = {"after": cursor, **({"wait": WAIT_SECONDS} if follow else {})}
        found = gateway.get(f"/api/requests/{request_id}/events", **query)
        for event in found["events"]:
            cursor = event["cursor"]
            print(f"{_clock(event['at'])} {event['status']:<12} {event['description']}", flush=True)
            if event["status"] in TERMINAL:
                return
        if not follow:
            return


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at * 1000) % 1000:03d}"
