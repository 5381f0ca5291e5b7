"""`requests` and its short forms: what became of requests, and what to do about it. Asked over HTTP."""

from __future__ import annotations

import json as json_module
import time
from typing import Annotated, Any

import typer

from .context import HomeOption, JsonOption, refusals, table

STATUS_HELP = """Show one request, or, without one, the service: workers, models, what waits, and why no worker comes.

Examples:

  edif-hpc status

  edif-hpc status 3fa85f64-5717-4562-b3fc-2c963f66afa6
"""
SHOW_HELP = """Show one request: its status and why, times, worker, result, and which request it repeats.

Example:

  edif-hpc requests show 3fa85f64-5717-4562-b3fc-2c963f66afa6
"""
CANCEL_HELP = """End a request that waits or runs.

Example:

  edif-hpc {}cancel 3fa85f64-5717-4562-b3fc-2c963f66afa6
"""
LIST_HELP = """List your recent requests, newest first.

Examples:

  edif-hpc requests list --limit 10

  edif-hpc requests list --user ada --json
"""
DEAD_HELP = """List requests that were given up after too many losses, with the cause: yours; for admins, all.

Example:

  edif-hpc requests dead
"""
RETRY_HELP = """Try a failed request again: a new one, with the same payload. The old one stays as it ended.

Example:

  edif-hpc requests retry 3fa85f64-5717-4562-b3fc-2c963f66afa6
"""
DELETE_HELP = """Forget an ended request at once: its record, events, result and payload.

Example:

  edif-hpc requests delete 3fa85f64-5717-4562-b3fc-2c963f66afa6
"""
OUTCOMES = {
    "ended": "Cancelled before it ran.",
    "told": "Its worker was told to end it.",
    "done": "It had ended already.",
}
WORDS = 80
"""Characters of a description, or of a cause, that a table shows."""


def _is_id(text: str) -> str:
    if not all(letter.isalnum() or letter == "-" for letter in text):
        raise typer.BadParameter(f"{text!r} is no request's id; `edif-hpc requests list` shows yours.")
    return text


RequestArgument = Annotated[str, typer.Argument(metavar="REQUEST", help="A request's id.", callback=_is_id)]
LimitOption = Annotated[int, typer.Option(min=1, help="How many.")]

requests_app = typer.Typer(help="Requests of a user.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command("status", help=STATUS_HELP)(status)
    app.command("cancel", help=CANCEL_HELP.format(""))(cancel)
    requests_app.command("list", help=LIST_HELP)(list_requests)
    requests_app.command("show", help=SHOW_HELP)(show)
    requests_app.command("dead", help=DEAD_HELP)(dead)
    requests_app.command("retry", help=RETRY_HELP)(retry)
    requests_app.command("cancel", help=CANCEL_HELP.format("requests "))(cancel)
    requests_app.command("delete", help=DELETE_HELP)(delete)
    app.add_typer(requests_app, name="requests")


@refusals
def status(
    request: Annotated[str, typer.Argument(metavar="[REQUEST]", help="A request's id.")] = "",
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway

    gateway = Gateway(Home.locate(home))
    if request:
        _one(gateway.get(f"/api/requests/{request}"), json)
        return
    seen = gateway.get("/api/workers")
    workers, notices, slurm = seen["workers"], seen["notices"], seen["slurm_commands"]
    models = gateway.get("/api/models")["models"]
    if json:
        found = {"url": gateway.url, "workers": workers, "models": models, "notices": notices, "slurm_commands": slurm}
        print(json_module.dumps(found, indent=2))
        return
    waiting = sum(model["waiting"] for model in models)
    print(f"{gateway.url}: {len(workers)} workers, {waiting} requests waiting")
    rows = [
        {"model": model["repo_id"], "waiting": model["waiting"], "held": _held(model["workers"])}
        for model in models
        if model["waiting"] or model["workers"]
    ]
    if rows:
        table("Models", {"model": "MODEL", "waiting": "WAITING", "held": "WORKERS"}, rows, json=False)
    for subject, sentence in sorted(notices.items()):
        print(f"{subject.replace(':', ' ')}: {sentence}")
    if slurm["total"]:
        last, this = _counts(slurm["last_hour"]), _counts(slurm["this_hour"])
        print(f"Slurm commands: {last} in the last full hour, {this} in this one")


def _counts(by_command: dict[str, int]) -> str:
    return ", ".join(f"{number} {command}" for command, number in by_command.items()) or "none"


def _held(workers: list[dict[str, Any]]) -> str:
    return ", ".join(f"{worker['worker']} ({worker['error'] or worker['state']})" for worker in workers)


@refusals
def show(request: RequestArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway

    _one(Gateway(Home.locate(home)).get(f"/api/requests/{request}"), json)


def _one(found: dict[str, Any], json: bool) -> None:
    from .show import moment, size

    if json:
        print(json_module.dumps(found, indent=2))
        return
    shown = {
        "request": found["id"],
        "name": found["name"],
        "status": found["status"],
        "": found["description"],
        "user": found["user"],
        "model": found["model"],
        "submitted": moment(found["submitted"]),
        "claimed": moment(found["claimed"]),
        "finished": moment(found["finished"]),
        "attempt": found["attempt"] or "",
        "worker": found["worker"],
        "given up": found["dead"],
        "repeats": found["repeats"],
        "repeated by": found["repeated_by"],
        "result": found.get("result") or "",
        "size": size(found.get("result_bytes")),
    }
    for name, value in shown.items():
        if value:
            print(f"{name:<11} {value}")


@refusals
def cancel(request: RequestArgument, home: HomeOption = None) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway

    outcome = Gateway(Home.locate(home)).post(f"/api/requests/{request}/cancel")["outcome"]
    print(OUTCOMES.get(outcome, outcome))


@refusals
def retry(request: RequestArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway

    made = Gateway(Home.locate(home)).post(f"/api/requests/{request}/retry")
    print(json_module.dumps(made, indent=2) if json else f"Submitted again as {made['id']}.")


@refusals
def delete(request: RequestArgument, home: HomeOption = None) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway

    Gateway(Home.locate(home)).delete(f"/api/requests/{request}")
    print("Deleted: its record, events, result and payload are gone.")


@refusals
def list_requests(
    home: HomeOption = None,
    limit: LimitOption = 50,
    user: Annotated[str, typer.Option(help="Somebody else's (for the owner of the service).")] = "",
    json: JsonOption = False,
) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway
    from .show import duration, moment

    query: dict[str, Any] = {"limit": limit, **({"user": user} if user else {})}
    found = Gateway(Home.locate(home)).get("/api/requests", **query)["requests"]
    if not json:
        for row in found:
            row["took"] = duration((row["finished"] or time.time()) - row["submitted"]) if row["submitted"] else ""
            row["submitted"] = moment(row["submitted"])
            row["description"] = row["description"].strip().rpartition("\n")[2][:WORDS]
    columns = {
        "id": "REQUEST", "name": "NAME", "user": "USER", "model": "MODEL", "status": "STATUS", "submitted": "SUBMITTED",
        "took": "TOOK", "description": "",
    }  # fmt: skip
    table("Requests", columns, found, json=json)


@refusals
def dead(home: HomeOption = None, limit: LimitOption = 50, json: JsonOption = False) -> None:
    from edif_hpc.core.home import Home

    from .http import Gateway
    from .show import moment

    found = Gateway(Home.locate(home)).get("/api/dead", limit=limit)["requests"]
    if not json:
        for row in found:
            row["finished"] = moment(row["finished"])
            row["dead"] = row["dead"][:WORDS]
    columns = {
        "id": "REQUEST", "user": "USER", "model": "MODEL", "finished": "GIVEN UP", "attempt": "ATTEMPTS",
        "dead": "CAUSE", "repeated_by": "REPEATED BY",
    }  # fmt: skip
    table("Dead requests", columns, found, json=json, empty="No request was given up.")
