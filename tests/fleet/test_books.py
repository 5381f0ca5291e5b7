"""How often Slurm was asked is written to Redis; and a Redis that is away or hangs holds nobody up."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from edif_hpc.core.tally import KEPT_SECONDS, Tally, slurm_commands
from edif_hpc.fleet.slurm import books
from edif_hpc.fleet.slurm.books import END_SECONDS, Books
from tests.support.servers import RedisProcess, eventually


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    folder = tmp_path / "redis"
    folder.mkdir()
    found = RedisProcess(folder, persistent=True)
    try:
        found.start()
        yield found
    finally:
        if found.process:
            found.process.send_signal(signal.SIGCONT)
        found.kill()


def ask(redis: RedisProcess, question: Any) -> Any:
    async def run() -> Any:
        async with redis.endpoint.client() as client:
            return await question(client)

    return asyncio.run(run())


def total(redis: RedisProcess) -> dict[str, int]:
    found: dict[str, int] = ask(redis, slurm_commands)["total"]
    return found


# -- a process without an event loop ----------------------------------------------------------------------------------


def test_what_is_counted_is_soon_written_by_kind(redis: RedisProcess) -> None:
    kept = Books(lambda: redis.endpoint)
    for command in ("squeue", "sbatch", "squeue"):
        kept.count(command)  # type: ignore[arg-type]  # each is one of the kinds
    eventually(lambda: total(redis) == {"sbatch": 1, "squeue": 2}, 10.0, "the books")
    kept.count("scancel")
    kept.close()
    assert total(redis) == {"sbatch": 1, "scancel": 1, "squeue": 2}


def test_two_who_count_add_up_and_an_hour_is_forgotten(redis: RedisProcess) -> None:
    for _ in range(2):
        kept = Books(lambda: redis.endpoint)
        kept.count("squeue")
        kept.close()
    assert total(redis) == {"squeue": 2}

    async def expiries(client: Any) -> list[int]:
        return [await client.ttl(key) async for key in client.scan_iter("edif:slurm_hour:*")]

    left = ask(redis, expiries)
    assert left
    assert all(0 < seconds <= KEPT_SECONDS for seconds in left)


def test_without_redis_nothing_waits_and_nothing_is_lost(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "RETRY_SECONDS", 0.1)
    redis.kill()
    kept = Books(lambda: redis.endpoint)
    began = time.monotonic()
    for _ in range(1000):
        kept.count("squeue")
    assert time.monotonic() - began < 1.0
    redis.start()
    eventually(lambda: total(redis) == {"squeue": 1000}, 20.0, "the books")
    kept.close()


def test_a_redis_that_is_away_is_no_news_for_whoever_gave_a_command(
    redis: RedisProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    redis.kill()
    with books.books(lambda: redis.endpoint) as count:
        count("squeue")
    assert capfd.readouterr() == ("", "")


def test_a_redis_that_hangs_does_not_hold_up_the_end(redis: RedisProcess) -> None:
    assert redis.process
    redis.process.send_signal(signal.SIGSTOP)
    kept = Books(lambda: redis.endpoint)
    began = time.monotonic()
    kept.count("squeue")
    kept.close()
    assert time.monotonic() - began < END_SECONDS + 1.0


# -- an event loop ----------------------------------------------------------------------------------------------------


def test_what_could_not_be_written_is_written_the_next_time(redis: RedisProcess) -> None:
    tally = Tally()
    tally.count("sbatch")
    redis.kill()
    with pytest.raises(RedisError):
        ask(redis, tally.write)
    redis.start()
    ask(redis, tally.write)
    ask(redis, tally.write)
    assert total(redis) == {"sbatch": 1}
    assert tally.is_empty
