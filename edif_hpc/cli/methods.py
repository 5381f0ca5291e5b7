"""`methods`: what `submit --method` can be asked for; and its parameters, from what was typed to what is checked.

Everything here is known without torch and without a service.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .context import refusals, table

if TYPE_CHECKING:
    from edif_hpc.core.methods import Method

METHODS_HELP = """List the methods that `edif-hpc submit --method` runs, or the parameters of one.

Examples:

  edif-hpc methods

  edif-hpc methods activation-patching

  edif-hpc methods --json
"""
MethodOption = Annotated[
    str, typer.Option("--method", metavar="NAME", help="A method instead of a script; see `edif-hpc methods`.")
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt for the method; repeatable.")
]
PromptsFileOption = Annotated[
    Path | None,
    typer.Option("--prompts-file", metavar="FILE", help="Prompts, one a line; where the name ends in .json, a list."),
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        "-P",
        metavar="NAME=VALUE",
        help="A parameter of the method: JSON, text, or @FILE; repeatable.",
    ),
]
FROM_FILE = "@"


def register(app: typer.Typer) -> None:
    app.command("methods", help=METHODS_HELP)(methods)


@refusals
def methods(
    method: Annotated[str, typer.Argument(metavar="[METHOD]", help="One of them.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with the schema of the parameters.")] = False,
) -> None:
    from edif_hpc.core.methods import METHODS, named

    found = [named(method)] if method else list(METHODS.values())
    if json:
        told = [_described(each) for each in found]
        print(json_module.dumps(told[0] if method else told, indent=2))
    elif method:
        print(f"{found[0].name}: {found[0].gives}\nForms of its result: {', '.join(found[0].forms())}\n")
        rows = [
            {**each, "default": "needed" if each["needed"] else json_module.dumps(each["default"])}
            for each in _described(found[0])["parameters"]
        ]
        table("Parameters", {"name": "PARAMETER", "default": "DEFAULT", "is": ""}, rows, json=False)
    else:
        listed = [{"name": each.name, "gives": each.gives, "takes": _takes(each)} for each in found]
        table("Methods", {"name": "METHOD", "gives": "", "takes": "PARAMETERS (* needed)"}, listed, json=False)


def _described(method: type[Method]) -> dict[str, Any]:
    parameters = [
        {
            "name": name, "needed": field.is_required(), "is": field.description,
            **({} if field.is_required() else {"default": field.default}),
        }
        for name, field in method.model_fields.items()
    ]  # fmt: skip
    return {
        "name": method.name, "gives": method.gives, "forms": method.forms(), "parameters": parameters,
        "schema": method.model_json_schema(),
    }  # fmt: skip


def _takes(method: type[Method]) -> str:
    fields = sorted(method.model_fields.items(), key=lambda item: not item[1].is_required())
    return " ".join(f"{name}{'*' if field.is_required() else ''}" for name, field in fields)


# -- parameters --------------------------------------------------------------------------------------------------------


def parameters(given: list[str], prompts: list[str], prompts_file: Path | None) -> dict[str, Any]:
    """Parameters as they were typed, not checked.

    Raises:
        MethodError: a file cannot be read, or holds something else.
        typer.BadParameter: one is no NAME=VALUE, or is given twice.
    """
    found: dict[str, Any] = {}

    def take(name: str, value: Any, option: str) -> None:
        spelled = name.replace("-", "_")
        if spelled in found:
            raise typer.BadParameter(f"{name} is given twice; a list is one JSON value", param_hint=option)
        found[spelled] = value

    if prompts_file is not None:
        from_file = _file(prompts_file)
        take("prompts", [*prompts, *(from_file if isinstance(from_file, list) else [from_file])], "--prompts-file")
    elif prompts:
        take("prompts", prompts, "--prompt")
    for text in given:
        name, separator, value = text.partition("=")
        if text.startswith(FROM_FILE):
            for each, inner in _several(Path(text.removeprefix(FROM_FILE))).items():
                take(each, inner, "--param")
        elif not separator or not name:
            raise typer.BadParameter(f"{text!r} is no NAME=VALUE", param_hint="--param")
        else:
            take(name, _value(value), "--param")
    return found


def checked(name: str, given: dict[str, Any], form: str) -> Method:
    """The parameters of the method of this name.

    Raises:
        MethodError: there is no such method or parameter, a value cannot be used, or its result has no such form.
    """
    from edif_hpc.core.errors import MethodError
    from edif_hpc.core.methods import named, parse

    forms = named(name).forms()
    asked = parse(name, given)
    if form not in forms:
        why = "is no table" if form == "parquet" else "is written by the service"
        raise MethodError(
            f"The result of {asked.name} {why}: take .{', .'.join(forms[:-1])} or .{forms[-1]} (--out or --form)."
        )
    return asked


def _value(text: str) -> Any:
    if text.startswith(FROM_FILE):
        return _file(Path(text.removeprefix(FROM_FILE)))
    try:
        return json_module.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _file(file: Path) -> Any:
    """What a file holds: JSON by its suffix, else its lines, without empty ones.

    Raises:
        MethodError: it cannot be read.
    """
    from edif_hpc.core.errors import MethodError

    try:
        text = file.expanduser().read_text(encoding="utf-8")
        if file.suffix.lower() == ".json":
            return json_module.loads(text, parse_constant=_no_constant)
    except OSError as error:
        raise MethodError(f"{file} cannot be read ({error.strerror}); name a file of text or JSON.") from None
    except UnicodeDecodeError:
        raise MethodError(f"{file} cannot be read (it is not UTF-8 text); name a file of text or JSON.") from None
    except (ValueError, RecursionError) as error:
        raise MethodError(f"{file} holds no JSON ({error}); mend it, or give it another suffix for lines.") from None
    return [line for line in (each.removesuffix("\r") for each in text.split("\n")) if line.strip()]


def _several(file: Path) -> dict[str, Any]:
    """Parameters by name: a file of them, or a kept result, which has those that it was made with.

    Raises:
        MethodError: it is neither.
    """
    from edif_hpc.core.errors import MethodError
    from edif_hpc.core.scripts.plain import META

    found = _file(file)
    if isinstance(found, dict) and META in found:
        record = found[META].get("record", {}) if isinstance(found[META], dict) else {}
        if "made_by" in record:
            raise MethodError(
                f"{file} was made by {record['made_by']} from several results, so no one method makes it again; its "
                "record tells theirs."
            )
        found = record.get("parameters")
    if not isinstance(found, dict):
        raise MethodError(f"{file} holds no parameters by name; make it a .json file with an object.")
    return found
