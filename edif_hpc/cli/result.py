"""`result`: what a request saved, into a file; it goes on where an earlier download was cut off. Needs no torch."""

from __future__ import annotations

import json as json_module
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .context import HomeOption, JsonOption, refusals
from .requests import RequestArgument

if TYPE_CHECKING:
    import httpx

    from .http import Gateway

RESULT_HELP = """Download the result of a request into a file. Run again, it goes on where it was cut off.

The file is what nnsight would load: edif_hpc.load(FILE) reads it, or torch.load(FILE, weights_only=False), once
`zstd -d` has unpacked it where its name ends in .zst.

Examples:

  edif-hpc result 3fa85f64-5717-4562-b3fc-2c963f66afa6

  edif-hpc result 3fa85f64-5717-4562-b3fc-2c963f66afa6 --out hidden-states.pt
"""
TRIES = 5
"""Connections that may break in a row without a byte between them."""
PAUSE_SECONDS = 0.5
CHUNK_BYTES = 1024 * 1024
PARTIAL = 206
ZSTD = b"\x28\xb5\x2f\xfd"
FIRST_BYTES = 8
COMPLETED, ERROR = "COMPLETED", "ERROR"

Advance = Callable[[int], None]


def register(app: typer.Typer) -> None:
    app.command("result", help=RESULT_HELP)(result)


@refusals
def result(
    request: RequestArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to (default: REQUEST.pt here).")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway
    from .show import size

    gateway = Gateway(Home.locate(home))
    found = gateway.get(f"/api/requests/{request}")
    _refuse_without_result(found)
    try:
        file, began = fetch(gateway, found, out)
    except KeyboardInterrupt:
        print("Cut off; the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from None
    if json:
        told = {
            "id": request, "file": str(file.absolute()), "bytes": file.stat().st_size,
            "downloaded_bytes": found["result_bytes"], "resumed_from": began,
        }  # fmt: skip
        print(json_module.dumps(told, indent=2))
    else:
        print(f"{file} ({size(file.stat().st_size)})")


def fetch(gateway: Gateway, found: dict[str, Any], out: Path | None) -> tuple[Path, int]:
    """Download the result of a request that has one, as the gateway tells of it.

    Returns:
        The file, and how much of it an earlier download had left.

    Raises:
        SettingsError: there can be no such file.
        WrongState: the result is of another form than the file's name says.
        Unavailable: the connection breaks again and again.
    """
    from edif_hpc.core import planes
    from edif_hpc.core.errors import SettingsError

    request = found["id"]
    _refuse_other_form(found, out)
    part = out.with_name(f".{out.name}.{request}.part") if out else Path(f".{request}.part")
    try:
        began = part.stat().st_size if part.exists() else 0
        with _progress(found["result_bytes"], began) as advance:
            _download(gateway, found["result"], part, found["result_bytes"], advance)
        first = _first_bytes(part)
        suffix = _suffix(found) or f".pt{'.zst' if first.startswith(ZSTD) else ''}"
        file = out or Path(f"{request}{suffix}")
        if first == planes.MAGIC and not _suffix(found):
            _unpack(part, file)
        else:
            part.replace(file)
    except OSError as error:
        raise SettingsError(
            f"{part.parent.absolute()} takes no file ({error.strerror}); choose another with --out."
        ) from None
    return file, began


def _suffix(found: dict[str, Any]) -> str:
    """Of a script's result: the form it was asked for, or `.out` for a file that the script wrote itself."""
    from edif_hpc.core.scripts.files import OWN_FORM

    return {"": "", OWN_FORM: ".out"}.get(found["form"], f".{found['form']}")


def _refuse_other_form(found: dict[str, Any], out: Path | None) -> None:
    """Nothing is converted here, so a name must not promise it."""
    from edif_hpc.core.errors import WrongState
    from edif_hpc.core.scripts.files import FORMS

    asked = out.suffix.removeprefix(".").lower() if out else ""
    given = _suffix(found).removeprefix(".")
    if asked in FORMS and given in FORMS and asked != given:
        raise WrongState(
            f"This result is a .{given} file, and nothing is converted here; take such a name, or submit the script "
            f"again with --out {out}."
        )


def _refuse_without_result(found: dict[str, Any]) -> None:
    from edif_hpc.core.errors import WrongState

    if found["status"] == ERROR:
        raise WrongState(f"This request has no result, it failed: {found['description'].strip()}")
    if found["status"] != COMPLETED:
        raise WrongState(
            f"This request has no result yet, it is {found['status']}; follow it with `edif-hpc logs {found['id']} -f`."
        )


def _download(gateway: Gateway, url: str, part: Path, size: int, advance: Advance) -> None:
    """Fetch what is missing of a result, over as many connections as it takes.

    Raises:
        Unavailable: the connection breaks again and again, or what came is not the whole.
    """
    import httpx

    from edif_hpc.core.errors import Unavailable

    from .http import Refused, detail

    tries = 0
    while (have := part.stat().st_size if part.exists() else 0) < size:
        try:
            with gateway.stream(url, have) as answer:
                if answer.is_error:
                    answer.read()
                    raise Refused(detail(answer))
                _append(answer, part, have, advance)
        except httpx.HTTPError as error:
            tries = tries + 1 if (part.stat().st_size if part.exists() else 0) == have else 1
            if tries >= TRIES:
                raise Unavailable(
                    f"The download breaks off again and again ({error}); run the same command again."
                ) from None
            time.sleep(PAUSE_SECONDS)  # before the next connection: the gateway may be starting
    if have > size:
        part.unlink()
        raise Unavailable(f"What came is {have} bytes and the result has {size}; run the same command again.")


def _append(answer: httpx.Response, part: Path, have: int, advance: Advance) -> None:
    """Write an answer behind what is there; one that begins at the start replaces it."""
    resumed = answer.status_code == PARTIAL
    if have and not resumed:
        advance(-have)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if resumed else os.O_TRUNC), 0o600), "wb") as file:
        for chunk in answer.iter_raw(CHUNK_BYTES):
            file.write(chunk)
            advance(len(chunk))


def _first_bytes(file: Path) -> bytes:
    """As many as tell how a result is packed."""
    with file.open("rb") as opened:
        return opened.read(FIRST_BYTES)


def _unpack(part: Path, file: Path) -> None:
    """Byte planes, which our own client asks for, become the file that torch.save wrote."""
    from edif_hpc.core import planes
    from edif_hpc.core.errors import ComponentError, TransferError

    draft = part.with_name(f"{part.name}.unpacked")
    try:
        planes.decode_file(part, draft, os.cpu_count() or 1)
    except ImportError as error:
        raise ComponentError(
            f"This result is packed in byte planes, and there is no {error.name} here to unpack it: install "
            "edif-hpc[client], then run the same command again."
        ) from None
    except TransferError:
        part.unlink()  # whole and damaged: reading on would not mend it
        raise
    draft.replace(file)
    part.unlink()


@contextmanager
def _progress(size: int, began: int) -> Iterator[Advance]:
    """A bar with size, rate and what is left, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=size, completed=began)
        yield lambda number: bar.advance(task, number)
