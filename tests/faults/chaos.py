"""`make chaos`: the busiest day of the pilot in ten minutes, while something is killed every ten seconds.

700 requests from sixteen users, half of them with the stock client and half with ours, each a process of its own.
Afterwards every user's list is held against what that user was answered, and the README gets the table.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from tests.delivery.scene import pids
from tests.support import models
from tests.support.long_report import README, replaced
from tests.support.stack import Stack

from .chaos_client import OURS, STOCK, Answered, Task
from .scene import COMPONENTS, reference, service

REQUESTS = int(os.environ.get("CHAOS_REQUESTS", "700"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "600"))
CLIENTS = 16
KILL_EVERY_SECONDS = 10.0
RUN_SECONDS = 1.2
"""Two workers are busy two thirds of the time with 700 of them in ten minutes."""
START_SECONDS_EACH = 4.0
"""Sixteen processes import torch before the first request."""
UNKNOWN = -1
VICTIMS = (*COMPONENTS, "worker", "model host", "executor")
WORKERS = 2
MARKER = "chaos"


@dataclass
class Killed:
    """One kill, and how many requests were open at that moment."""

    victim: str
    open: int


@dataclass
class Account:
    """What the users were answered, and what the service says of the same requests."""

    answers: list[Answered] = field(default_factory=list)
    listed: Counter[str] = field(default_factory=Counter)
    twice: list[str] = field(default_factory=list)
    extra: int = 0

    @property
    def lost(self) -> int:
        return REQUESTS - len(self.answers)

    @property
    def wrong(self) -> list[str]:
        return [answer.wrong for answer in self.answers if answer.wrong]

    @property
    def well(self) -> bool:
        return not (self.lost or self.wrong or self.twice or self.extra) and self.listed == {"COMPLETED": REQUESTS}


def main() -> int:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {seed} (CHAOS_SEED): {REQUESTS} requests from {CLIENTS} clients in {SECONDS:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="edif-chaos-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        cache = models.build_cache(Path(folder) / "hf", ["gpt2"])
        models.offline_client(cache)
        logits = reference()
        with service(Path(folder) / "home", cache, workers=WORKERS) as stack:
            kills, account = run(stack, cache, logits, random.Random(seed))
            if not account.well:
                print(stack.logs())
    text = table(kills, account)
    print(text)
    if account.well and len(kills) >= SECONDS / KILL_EVERY_SECONDS - 1 and REQUESTS >= 700:
        README.write_text(replaced(README.read_text(), text, MARKER))
    else:
        print("The README is as it was: this was no whole run, or not all went well.")
        print("\n".join([*account.wrong, *account.twice]))
    return 0 if account.well else 1


def run(stack: Stack, cache: Path, logits: torch.Tensor, dice: random.Random) -> tuple[list[Killed], Account]:
    keys = [stack.json("keys", "create", f"client-{number:02}")["key"] for number in range(CLIENTS)]
    kills: list[Killed] = []
    with clients(stack, cache, logits, keys) as running:
        last = time.time()
        while any(client.poll() is None for client in running):
            time.sleep(0.5)
            if time.time() - last >= KILL_EVERY_SECONDS and len(kills) < SECONDS / KILL_EVERY_SECONDS:
                last = time.time()
                if (killed := kill(stack, keys, dice)) is not None:
                    kills.append(killed)
                    print(f"{len(kills):3}. {killed.victim}, {killed.open} open", flush=True)
        return kills, accounted(stack, keys, [client.communicate()[0] for client in running])


@contextmanager
def clients(stack: Stack, cache: Path, logits: torch.Tensor, keys: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """All users, begun at the same time; none is left."""
    started: list[subprocess.Popen[str]] = []
    command = [sys.executable, "-m", "tests.faults.chaos_client"]
    counts = [REQUESTS // CLIENTS + (number < REQUESTS % CLIENTS) for number in range(CLIENTS)]
    pace = SECONDS / max(counts)
    begin = time.time() + CLIENTS * START_SECONDS_EACH
    try:
        for number, (key, count) in enumerate(zip(keys, counts, strict=True)):
            task = Task(
                OURS if number % 2 else STOCK, stack.url, key, str(cache), sum(counts[:number]), count,
                begin + number * pace / CLIENTS, pace, RUN_SECONDS, logits.tolist(),
            )  # fmt: skip
            client = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=models.REPO,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            started.append(client)
            assert client.stdin is not None
            client.stdin.write(json.dumps(asdict(task)) + "\n")
            client.stdin.flush()
        for client in started:
            assert client.stdout is not None
            assert json.loads(client.stdout.readline()) == "ready"
        yield started
    finally:
        for client in started:
            if client.poll() is None:
                client.kill()
            client.wait()


def kill(stack: Stack, keys: list[str], dice: random.Random) -> Killed | None:
    """SIGKILL one of VICTIMS; None when there is none of that kind at the moment."""
    victim, open_ = dice.choice(VICTIMS), opened(stack, keys)
    found = processes(stack, victim)
    if not found:
        return None
    try:
        os.kill(dice.choice(found), signal.SIGKILL)
    except ProcessLookupError:
        return None
    return Killed(victim, open_)


def processes(stack: Stack, victim: str) -> list[int]:
    living = pids(stack)
    if victim in living:
        return [living[victim]]
    found = [psutil.Process(pid) for name, pid in living.items() if name.startswith("worker-")]
    try:
        if victim != "worker":
            found = [child for worker in found for child in worker.children()]
        if victim == "executor":  # host -> keeper or zygote -> executors, spare ones too
            found = [leaf for host in found for leaf in host.children(recursive=True) if not leaf.children()]
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in found]


def opened(stack: Stack, keys: list[str]) -> int:
    """Requests that have not ended; UNKNOWN while nobody answers."""
    try:
        rows = [row for key in keys for row in listed(stack, key, 5)]
    except httpx.HTTPError:
        return UNKNOWN
    return sum(row["status"] not in ("COMPLETED", "ERROR") for row in rows)


def listed(stack: Stack, key: str, seconds: float = 60) -> list[dict[str, Any]]:
    answer = httpx.get(f"{stack.url}/api/requests?limit=500", headers={"ndif-api-key": key}, timeout=seconds)
    answer.raise_for_status()
    rows: list[dict[str, Any]] = answer.json()["requests"]
    return rows


def accounted(stack: Stack, keys: list[str], printed: list[str]) -> Account:
    account = Account()
    for key, lines in zip(keys, printed, strict=True):
        answers = [Answered(**json.loads(line)) for line in lines.splitlines()]
        account.answers += answers
        headers = {"ndif-api-key": key}
        rows = listed(stack, key)
        account.extra += max(0, len(rows) - len(answers))
        account.listed.update(row["status"] for row in rows)
        for row in rows:
            story = httpx.get(f"{stack.url}/api/requests/{row['id']}/events", headers=headers, timeout=60).json()
            ends = [event["status"] for event in story["events"] if event["status"] in ("COMPLETED", "ERROR")]
            if ends != ["COMPLETED"]:
                account.twice.append(f"{row['id']} ended {ends}")
    return account


def table(kills: list[Killed], account: Account) -> str:
    seconds = sorted(answer.seconds for answer in account.answers) or [0.0]
    broken = sum(answer.broken > 0 for answer in account.answers)
    tally = Counter(each.victim for each in kills)
    victims = ", ".join(f"{name} {tally[name]}" for name in VICTIMS)
    busy = statistics.median([each.open for each in kills if each.open != UNKNOWN] or [0])
    lines = [
        f"Last run on {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores: {REQUESTS} requests from {CLIENTS} clients "
        f"in {SECONDS / 60:.0f} minutes, {len(kills)} kills ({victims}), "
        f"with {busy:g} requests open at the time (median).\n",
        "| requests | lost | duplicated | wrong | seconds to the result: median | 95 % | longest |",
        "|---|---|---|---|---|---|---|",
        f"| {REQUESTS} | {account.lost} | {account.extra + len(account.twice)} | {len(account.wrong)} "
        f"| {statistics.median(seconds):.1f} | {seconds[int(len(seconds) * 0.95)]:.1f} | {seconds[-1]:.1f} |\n",
        f"{broken} of the {REQUESTS // 2} requests of stock clients lost their connection, and were found through the "
        "list.\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
