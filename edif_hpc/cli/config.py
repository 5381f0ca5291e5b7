"""`config show` and `config docs`: the effective settings and where each came from, and the table in the README."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin

import typer

from .context import ConfigOption, HomeOption, JsonOption, glance, refusals, settings_for, table

SHOW_HELP = """Show every setting, its effective value and where that came from. Secrets are masked.

Examples:

  edif-hpc config show

  EDIF_HPC_GATEWAY__PORT=8080 edif-hpc config show --config site.toml --json
"""
DOCS_HELP = """Print the table of all settings in Markdown, as it stands in the README.

Example:

  edif-hpc config docs
"""
MASK = "********"
UNSET = "unset"
"""Not "none", which is an isolation level."""
SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""User and password in a URL. Settings hold no other secrets, they name the files that do."""

config_app = typer.Typer(help="The settings.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    config_app.command("show", help=SHOW_HELP)(show)
    config_app.command("docs", help=DOCS_HELP)(docs)
    app.add_typer(config_app, name="config")


@refusals
def show(home: HomeOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    place = glance(home)
    loaded = settings_for(place, config)
    rows = [
        {"setting": name, "value": masked(value), "origin": loaded.origins.get(name, "default")}
        for name, value in flattened(loaded.settings.model_dump(mode="json"), set(documented()))
    ]
    for row in rows:
        if row["setting"] == "pool":  # what is in each of them, `pool show` tells
            row["value"] = [pool.name for pool in loaded.settings.pool]
    if not json:
        for row in rows:
            row["value"] = '""' if row["value"] == "" else UNSET if row["value"] is None else row["value"]
    table("Settings", {"setting": "SETTING", "value": "VALUE", "origin": "ORIGIN"}, rows, json=json)


@refusals
def docs() -> None:
    print(markdown())


def markdown() -> str:
    """The settings as a Markdown table, in their own order."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for name, (default, description) in documented().items():
        lines.append(f"| `{name}` | `{default}` | {description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def documented() -> dict[str, tuple[str, str]]:
    """Setting -> (default, description), sections flattened with dots."""
    from pydantic import BaseModel

    from edif_hpc.core.settings import Settings

    found: dict[str, tuple[str, str]] = {}

    def visit(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                visit(kind, f"{prefix}{name}.")
            elif get_origin(kind) is list and issubclass(get_args(kind)[0], BaseModel):
                visit(get_args(kind)[0], f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
                found[f"{prefix}{name}"] = (
                    default,
                    field.description or "",
                )

    visit(Settings, "")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return UNSET
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)


def masked(value: Any) -> Any:
    return SECRET.sub(MASK, value) if isinstance(value, str) else value


def flattened(values: dict[str, Any], leaves: set[str], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in leaves:
            found.extend(flattened(value, leaves, f"{key}."))
        else:
            found.append((key, value))
    return found
