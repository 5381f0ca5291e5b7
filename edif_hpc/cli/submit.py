"""`submit`: a script, or a method by its name, as one request next to its models. Needs no torch and no nnsight."""

from __future__ import annotations

import json as json_module
import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .context import AWAY, HomeOption
from .methods import MethodOption, ParamOption, PromptOption, PromptsFileOption

if TYPE_CHECKING:
    from edif_hpc.core.scripts.envelope import NamedModel
    from edif_hpc.core.scripts.payload import Script

    from .http import Gateway

SUBMIT_HELP = """Run a script, or a method by its name, next to its models: as one request, on a worker that holds them.

The script is one file and runs as it would here. The models that it builds (TransformersModel(...),
LanguageModel(...)) are those that the worker holds, remote=True means there, and what it prints are the request's
lines. Its result is what it passes to edif_hpc.save(name, value), or the file that it writes to $EDIF_HPC_OUTPUT.
What follows -- are its arguments.

A method takes one model, prompts and other parameters: `edif-hpc methods` lists them, and they are checked before
anything is submitted. A parameter's VALUE is JSON or, failing that, text; @FILE is what a file holds: JSON where its
name ends in .json, else a text a line. -P @FILE.json holds parameters by name; a .json result stands for its own.

The request's id is printed at once, alone on its line, and the request goes on when the terminal is closed. With its
id go: status, logs -f, result, cancel.

Exit codes: 0 submitted, and with --wait, --follow or --out completed; 1 refused, or its result found no place here; 2
wrong usage; 3 the request failed or was cancelled, its error is on stderr; 4 the service does not answer; 130
interrupted with Ctrl-C, the request goes on.

Examples:

  edif-hpc submit probe.py

  edif-hpc submit probe.py --out probes.npz --time 5 -- --layers 4 8 12

  ID=$(edif-hpc submit sweep.py --model meta-llama/Llama-3.1-8B --name sweep) && edif-hpc logs -f $ID

  edif-hpc submit --method logit-lens --model openai-community/gpt2 --prompt "The Eiffel Tower is in" --out lens.json

  edif-hpc submit --method probe --model openai-community/gpt2 --prompts-file prompts.txt -P labels=@labels.txt

  edif-hpc submit --method activation-patching --model openai-community/gpt2 -P clean=@clean.txt -P corrupt=@corrupt.txt
  -P answer=" Paris" -P wrong=" Rome" -P component=mlp --out patched.parquet

  edif-hpc submit --method steering-vector --model openai-community/gpt2 -P positive=@love.txt -P negative=@hate.txt
  -P "layers=[4, 6, 8]" --out love.safetensors
"""
FAILED, INTERRUPTED = 3, 130
COMPLETED = "COMPLETED"


def register(app: typer.Typer) -> None:
    app.command("submit", help=SUBMIT_HELP)(submit)


def submit(
    script: Annotated[Path | None, typer.Argument(metavar="[FILE.py]", help="The script.")] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="What its sys.argv holds after its name.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="REPO[@REVISION][:TASK]",
            help="A model that it builds; once for each. Without: those found in its source. A method takes one.",
        ),
    ] = None,
    method: MethodOption = "",
    prompt: PromptOption = None,
    prompts_file: PromptsFileOption = None,
    param: ParamOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait, and show what it prints meanwhile.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Wait, and save its result there; .pt, .safetensors, .npz, .parquet or .json tells the form of what "
            "edif_hpc.save was given, or of a method's result, which the worker writes.",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--form", help="The same form, for a result that is fetched later (default: pt).")
    ] = "",
    limit: Annotated[
        str,
        typer.Option(
            "--time", metavar="TIME", help="The longest it may run, as Slurm writes it: MINUTES, H:MM:SS, D-HH:MM:SS."
        ),
    ] = "",
    pool: Annotated[str, typer.Option(help="The pool whose workers may take it (default: any).")] = "",
    name: Annotated[
        str, typer.Option(help="A name to find it by in `requests list` (default of a method: its own).")
    ] = "",
    home: HomeOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one object a line: what was submitted, events, the end.")
    ] = False,
) -> None:
    from edif_hpc.core.errors import EdifError, Unavailable

    form = _form(out, form)
    seconds = _seconds(limit)
    told = Told(json, follow)
    try:
        if method:
            work, named = _method(method, script, model or [], prompt, prompts_file, param, form)
            name = name or method.replace("_", "-")
        elif script is None or prompt or prompts_file or param:
            raise typer.BadParameter(
                "name one, or a script, and prompts and parameters only with one", param_hint="--method"
            )
        else:
            work, named = _script(script, arguments or [], model or [])
        if out is not None:
            _check_folder(out)
        gateway, made = _send(work, named, home, pool=pool, name=name, form=form, time=seconds)
        told.submitted(made)
        if wait or follow or out is not None:
            told.ended(_end(gateway, made["id"], told))
        if out is not None:
            _fetch(gateway, made["id"], out, told)
    except Unavailable as error:
        print(error, file=sys.stderr)
        raise typer.Exit(AWAY) from None
    except EdifError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        told.interrupted()
        raise typer.Exit(INTERRUPTED) from None


def _form(out: Path | None, form: str) -> str:
    """How saved values are written: by the suffix of --out, or as --form says."""
    from edif_hpc.core.scripts.files import FORMS, OWN_FORM

    if form and form not in FORMS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMS)}", param_hint="--form")
    by_suffix = out.suffix.removeprefix(".").lower() if out else ""
    if form and by_suffix in FORMS and by_suffix != form:
        raise typer.BadParameter(f"{out} names another form than --form {form}; leave one out", param_hint="--out")
    if out is None or form:
        return form or "pt"
    return by_suffix if by_suffix in FORMS else OWN_FORM


def _seconds(limit: str) -> float:
    from edif_hpc.core.pools import seconds_of

    try:
        return float(seconds_of(limit)) if limit else 0.0
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--time") from None


def _script(file: Path, arguments: list[str], models: list[str]) -> tuple[Script, list[NamedModel]]:
    from edif_hpc.core.errors import SettingsError
    from edif_hpc.core.scripts.found import models_in
    from edif_hpc.core.scripts.payload import Script

    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{file} cannot be read ({why}); name a Python file.") from None
    return Script(source, file.name, arguments), [_named(text) for text in models] or models_in(source, file.name)


def _method(
    name: str, file: Path | None, models: list[str], prompts: list[str] | None, prompts_file: Path | None,
    given: list[str] | None, form: str,
) -> tuple[Script, list[NamedModel]]:  # fmt: skip
    from edif_hpc.core.scripts.by_name import Asked

    from .methods import checked, parameters

    if file is not None:
        raise typer.BadParameter(f"takes no file, and {str(file)!r} is given; leave one out", param_hint="--method")
    if len(models) != 1:
        raise typer.BadParameter(f"a method takes one, and {len(models) or 'none'} is given", param_hint="--model")
    asked = checked(name, parameters(given or [], prompts or [], prompts_file), form)
    model = _named(models[0])
    return Asked.of(asked.name, model, form, asked.model_dump(mode="json")).script(), [model]


def _send(
    script: Script, models: list[NamedModel], home: Path | None, *, pool: str, name: str, form: str, time: float
) -> tuple[Gateway, dict[str, Any]]:
    from edif_hpc.core.home import Home
    from edif_hpc.core.scripts.envelope import ScriptEnvelope

    from .http import Gateway

    envelope = ScriptEnvelope.read(
        json_module.dumps(
            {
                "models": [one.model_dump() for one in models],
                "form": form, "pool": pool, "seconds": time, "name": name, "file": script.file,
            }
        )
    )  # fmt: skip
    envelope.keys()  # a name that can be no model's is refused here
    gateway = Gateway(Home.locate(home))
    headers = {"idempotency-key": uuid.uuid4().hex, "python-version": sys.version}
    made: dict[str, Any] = gateway.send("/api/scripts", envelope.model_dump(), script.pack(), headers)
    return gateway, made


def _named(text: str) -> NamedModel:
    from edif_hpc.core.scripts.envelope import NamedModel

    name, _, task = text.partition(":")
    repo_id, _, revision = name.partition("@")
    return NamedModel(repo_id=repo_id, revision=revision or None, task=task or None)


def _end(gateway: Gateway, request_id: str, told: Told) -> dict[str, Any]:
    """Follow it to its end; returns its terminal event."""
    from .following import events

    event: dict[str, Any] = {}
    for event in events(gateway, request_id):
        told.event(event)
    return event


def _check_folder(out: Path) -> None:
    """Refuse a place that takes no file before anything runs for it; what becomes of it meanwhile is told afterwards.

    Raises:
        SettingsError: there is no such folder, it may not be written to, or the name is a folder's.
    """
    from edif_hpc.core.errors import SettingsError

    folder = out.absolute().parent
    if out.is_dir():
        raise SettingsError(f"{out} is a folder; give --out the name of a file in it.")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise SettingsError(f"{folder} {why}; make it, or choose another with --out.")


def _fetch(gateway: Gateway, request_id: str, out: Path, told: Told) -> None:
    from edif_hpc.core.errors import EdifError

    from .result import fetch

    found = gateway.get(f"/api/requests/{request_id}")
    try:
        fetch(gateway, found, out)
    except EdifError as error:
        raise type(error)(f"{error} The request is completed: `edif-hpc result {request_id} --out FILE`.") from None
    told.fetched(out, found["result_bytes"])


class Told:
    """What is printed, and where: the id and what the script prints on stdout, everything about them on stderr."""

    def __init__(self, json: bool, follow: bool) -> None:
        self.json = json
        self.follow = follow
        self.request_id = ""

    def submitted(self, made: dict[str, Any]) -> None:
        self.request_id = made["id"]
        if self.json:
            self._line({key: made[key] for key in ("id", "status", "models", "name")})
        else:
            print(self.request_id, flush=True)

    def event(self, event: dict[str, Any]) -> None:
        shown = {key: event[key] for key in ("status", "description", "at")}
        if not self.follow:
            return
        if self.json:
            self._line({"id": self.request_id, **shown})
        elif event["status"] == "LOG":
            print(event["description"], flush=True)
        elif event["status"] not in ("COMPLETED", "ERROR"):
            print(f"{event['status']}: {event['description']}", file=sys.stderr, flush=True)

    def ended(self, event: dict[str, Any]) -> None:
        """Say how it ended; a failure ends the command."""
        if self.json and not self.follow:
            self._line({"id": self.request_id, **{key: event[key] for key in ("status", "description", "at")}})
        if event["status"] != COMPLETED:
            print(event["description"].rstrip(), file=sys.stderr)
            raise typer.Exit(FAILED)

    def fetched(self, file: Path, size_bytes: int) -> None:
        from .show import size

        if self.json:
            self._line({"id": self.request_id, "file": str(file.absolute()), "bytes": size_bytes})
        else:
            print(f"{file} ({size(size_bytes)})", file=sys.stderr)

    def interrupted(self) -> None:
        if self.request_id:
            print(
                f"The request goes on; `edif-hpc logs -f {self.request_id}` follows it, and "
                f"`edif-hpc cancel {self.request_id}` ends it.",
                file=sys.stderr,
            )

    def _line(self, fields: dict[str, Any]) -> None:
        print(json_module.dumps(fields, ensure_ascii=False), flush=True)
