"""`keys create|list|revoke`: who may use the service. Keys are shown once and kept as hashes."""

from __future__ import annotations

import json as json_module
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from .context import HomeOption, JsonOption, locate, refusals, table

if TYPE_CHECKING:
    from edif_hpc.core.apikeys import ApiKeys

T = TypeVar("T")

CREATE_HELP = """Make a key for a user. It is shown once: only its hash is kept.

Example:

  edif-hpc keys create ada --priority 6

  edif-hpc keys create prometheus --tag metrics
"""
TAG_HELP = (
    "`admin`: sees and cancels everybody's requests. `metrics`: may read /metrics. Any other word is only shown by "
    "whoami(). May be repeated."
)
LIST_HELP = """List keys: their names, never the keys.

Example:

  edif-hpc keys list --json
"""
REVOKE_HELP = """Revoke a key by its name; it stops working at once.

Example:

  edif-hpc keys revoke 3f9a0c11d2e4
"""

keys_app = typer.Typer(help="Keys of users.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    keys_app.command("create", help=CREATE_HELP)(create)
    keys_app.command("list", help=LIST_HELP)(list_keys)
    keys_app.command("revoke", help=REVOKE_HELP)(revoke)
    app.add_typer(keys_app, name="keys")


def _with_keys(home: Path | None, work: Callable[[ApiKeys], Awaitable[T]]) -> T:
    from edif_hpc.core.apikeys import ApiKeys

    from .redis import with_redis

    return with_redis(locate(home), lambda redis: work(ApiKeys(redis)))


@refusals
def create(
    user: Annotated[str, typer.Argument(help="The user's name.")],
    home: HomeOption = None,
    priority: Annotated[
        int, typer.Option(min=0, max=9, help="Priority of the user's requests; the highest goes first.")
    ] = 5,
    tag: Annotated[list[str] | None, typer.Option(help=TAG_HELP)] = None,
    json: JsonOption = False,
) -> None:
    key, record = _with_keys(home, lambda keys: keys.create(user, priority=priority, tags=tuple(tag or ())))
    if json:
        print(json_module.dumps({"key": key, "name": record.name, "user": record.user}))
        return
    print(f"The key of {record.user} (name {record.name}), shown this once:\n\n  {key}\n")
    print("Its user sets:  export NDIF_API_KEY=<key>")


@refusals
def list_keys(home: HomeOption = None, json: JsonOption = False) -> None:
    from .show import moment

    found = _with_keys(home, lambda keys: keys.all())
    rows = [
        {
            "name": record.name,
            "user": record.user,
            "created": record.created if json else moment(record.created),
            "priority": record.priority,
            "tags": list(record.tags) if json else " ".join(record.tags),
            "revoked": record.revoked if json else moment(record.revoked),
        }
        for record in found
    ]
    headings = {name: name.upper() for name in ("name", "user", "created", "priority", "tags", "revoked")}
    table("Keys", headings, rows, json=json)


@refusals
def revoke(
    name: Annotated[str, typer.Argument(help="The key's name, as `keys list` shows it.")], home: HomeOption = None
) -> None:
    record = _with_keys(home, lambda keys: keys.revoke(name))
    print(f"The key {record.name} of {record.user} is revoked.")
