"""Lineages against a real Redis: whoever asks, one successor appears, and no allocation serves out of its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.lineage import Answer, Lineages
from tests.support.servers import redis_server

LINE = "7c0d12"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisEndpoint]:
    with redis_server(tmp_path_factory.mktemp("redis")) as found:
        yield found


def scenario(endpoint: RedisEndpoint, body: Callable[[Lineages], Awaitable[None]]) -> None:
    async def run() -> None:
        async with endpoint.client() as redis:
            await redis.flushall()
            await body(Lineages(redis))

    asyncio.run(run())


def test_of_many_askers_one_submits(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        answers = [(await lineages.take(LINE, 2, taker)).answer for taker in ("worker", "supervisor", "fleet")]
        assert answers == [Answer.YOURS, Answer.TAKEN, Answer.TAKEN]
        assert (await lineages.take(LINE, 2, "worker")).answer is Answer.YOURS, "who has it may ask again"
        assert await lineages.record(LINE, 2, "4711") == "4711"
        known = await lineages.take(LINE, 2, "fleet")
        assert (known.answer, known.detail) == (Answer.SUBMITTED, "4711")

    scenario(endpoint, body)


def test_a_taker_that_dies_is_followed_by_another(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        await lineages.take(LINE, 2, "dies", seconds=0.05)
        async with asyncio.timeout(5):
            while (await lineages.take(LINE, 2, "next")).answer is Answer.TAKEN:
                await asyncio.sleep(0.01)

    scenario(endpoint, body)


def test_who_has_submitted_nothing_lets_others_try_at_once(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        await lineages.take(LINE, 2, "first")
        await lineages.abandon(LINE, 2, "somebody else")
        assert (await lineages.take(LINE, 2, "second")).answer is Answer.TAKEN
        await lineages.abandon(LINE, 2, "first")
        assert (await lineages.take(LINE, 2, "second")).answer is Answer.YOURS

    scenario(endpoint, body)


def test_two_allocations_of_one_generation_do_not_both_serve(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        assert await lineages.record(LINE, 2, "10") == "10"
        assert await lineages.record(LINE, 2, "11") == "10", "the first one recorded stays"
        assert "10" in (await lineages.enter(LINE, 2, "11")).superseded
        assert not (await lineages.enter(LINE, 2, "10")).superseded
        assert not (await lineages.enter(LINE, 2, "10")).superseded, "a worker that crashed comes back"

    scenario(endpoint, body)


def test_an_allocation_that_nobody_recorded_is_its_generation_when_it_begins(endpoint: RedisEndpoint) -> None:
    """Its taker died between sbatch and record."""

    async def body(lineages: Lineages) -> None:
        await lineages.take(LINE, 2, "dies")
        assert not (await lineages.enter(LINE, 2, "10")).superseded
        assert await lineages.record(LINE, 2, "11") == "10"
        assert await lineages.job_of(LINE, 2) == "10"

    scenario(endpoint, body)


def test_none_serves_after_a_later_generation_has_begun(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        await lineages.enter(LINE, 1, "10")
        await lineages.enter(LINE, 2, "20")
        assert "generation 2" in (await lineages.enter(LINE, 1, "10")).superseded

    scenario(endpoint, body)


def test_a_lineage_that_has_ended_has_no_successor(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        await lineages.enter(LINE, 1, "10")
        await lineages.record(LINE, 2, "20")
        assert await lineages.ended(LINE) == ""
        assert await lineages.end(LINE, 1, "handback")
        assert await lineages.ended(LINE) == "handback"
        assert "ended" in (await lineages.enter(LINE, 2, "20")).superseded, "it could not be taken back in time"
        assert (await lineages.take(LINE, 3, "fleet")).answer is Answer.ENDED
        assert not (await lineages.enter(LINE, 1, "10")).superseded

    scenario(endpoint, body)


def test_a_predecessor_ends_no_lineage_that_its_successor_serves_in(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        await lineages.enter(LINE, 1, "10")
        await lineages.enter(LINE, 2, "20")
        assert not await lineages.end(LINE, 1, "handback")
        assert (await lineages.take(LINE, 3, "worker")).answer is Answer.YOURS

    scenario(endpoint, body)


def test_a_generation_is_ready_for_the_first_time_once(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        assert [await lineages.note_ready(LINE, number) for number in (1, 1, 2)] == [True, False, True]

    scenario(endpoint, body)


def test_idleness_models_and_pace_are_handed_down(endpoint: RedisEndpoint) -> None:
    async def body(lineages: Lineages) -> None:
        await lineages.bequeath(LINE, 1000.5, ["a", "b"])
        await lineages.record(LINE, 2, "20")
        entry = await lineages.enter(LINE, 2, "20")
        assert (entry.used, entry.models) == (1000.5, ["a", "b"])
        assert entry.asked
        assert await lineages.pace("main") is None
        await lineages.note_pace("main", 20.0)
        await lineages.note_pace("main", 100.0)
        assert await lineages.pace("main") == 100.0, "a queue that got longer counts at once"
        await lineages.note_pace("main", 20.0)
        assert 20.0 < (await lineages.pace("main") or 0) < 100.0

    scenario(endpoint, body)


@pytest.mark.parametrize("round_", range(100))
def test_two_at_once_a_hundred_times(endpoint: RedisEndpoint, round_: int) -> None:
    """Two connections, as two machines have them."""

    async def run() -> None:
        async with endpoint.client() as one, endpoint.client() as two:
            await asyncio.gather(one.ping(), two.ping())
            answers = await asyncio.gather(*(
                Lineages(redis).take(f"race{round_}", 2, taker) for redis, taker in ((one, "one"), (two, "two"))
            ))  # fmt: skip
        assert sorted(intent.answer for intent in answers) == [Answer.TAKEN, Answer.YOURS]

    asyncio.run(run())
