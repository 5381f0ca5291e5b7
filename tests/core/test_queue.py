"""The queue's promises, against a real Redis: order, fairness, tokens, losses, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.errors import LeaseLost, QuotaExceeded
from edif_hpc.core.queue import Claim, Events, Queue, Release, Step, Submission, Verdict, keys
from edif_hpc.core.settings import LimitSettings
from edif_hpc.core.wire import Status
from tests.support.servers import redis_server

TARGET = "model-a"
LEASE = 30.0


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisEndpoint]:
    with redis_server(tmp_path_factory.mktemp("redis")) as found:
        yield found


def scenario(endpoint: RedisEndpoint, body: Callable[[Queue, Redis], Awaitable[None]], **limits: float) -> None:
    """Run one story on an empty Redis."""

    async def run() -> None:
        async with endpoint.client() as redis:
            await redis.flushall()
            await body(Queue(redis, LimitSettings(**limits)), redis)

    asyncio.run(run())


async def submit(queue: Queue, request_id: str, user: str = "ann", **fields: object) -> None:
    await queue.submit(
        Submission(
            request_id, user, str(fields.pop("target", TARGET)), "trace", {"n": request_id}, b"payload", **fields
        )  # type: ignore[arg-type]
    )


async def claim(queue: Queue, worker: str = "w1", **options: float) -> Claim | None:
    return await queue.claim(worker, [TARGET], LEASE, **options)


async def claimed(queue: Queue, worker: str = "w1") -> Claim:
    found = await claim(queue, worker)
    assert found is not None
    return found


async def statuses(redis: Redis, request_id: str) -> list[Status]:
    found = await Events(redis).read({request_id: "0-0"})
    return [event.status for event in found.get(request_id, [])]


def test_the_way_of_a_request(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        got = await claimed(queue)
        assert (got.request_id, got.payload, got.record, got.attempt, got.user) == (
            "r1", b"payload", {"n": "r1"}, 1, "ann",
        )  # fmt: skip
        await queue.event(got, Step(1, Status.RUNNING))
        await queue.event(got, Step(2, Status.LOG, "hello"))
        await queue.finish(
            got, Status.COMPLETED, result=b"answer", data={"inline": 6}, meta={"runtime": 1}, run_seconds=1
        )
        assert await statuses(redis, "r1") == [
            Status.QUEUED, Status.DISPATCHED, Status.RUNNING, Status.LOG, Status.COMPLETED,
        ]  # fmt: skip
        last = (await Events(redis).read({"r1": "0-0"}))["r1"][-1]
        assert last.data == {"inline": 6}
        assert last.meta == {"runtime": 1}
        assert await queue.result("r1") == b"answer"
        described = await queue.describe("r1")
        assert described is not None
        assert described["status"] == "COMPLETED"

    scenario(endpoint, story)


def test_every_key_of_an_ended_request_expires_and_nothing_else_is_left(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "done")
        await queue.finish(await claimed(queue), Status.COMPLETED, result=b"x", run_seconds=1)
        await submit(queue, "withdrawn")
        await queue.withdraw("withdrawn", "ann", "Cancelled.")
        await submit(queue, "taken")
        await queue.finish(await claimed(queue), Status.ERROR, "no", run_seconds=1)
        assert await queue.payload("taken") == b"payload"  # for another try
        assert await queue.payload("done") is None
        await submit(queue, "dead", "bob")
        for _ in range(3):
            await queue.release(await claimed(queue), Release.LOSS, "it was lost")
        assert await queue.dead() == ["dead"]
        permanent = {keys.COUNTERS}
        lasting = [key.decode() for key in await redis.keys("*") if await redis.pttl(key) == -1]
        assert set(lasting) <= permanent

    scenario(endpoint, story)


def test_what_a_user_has_open_is_listed_as_long_as_it_waits(endpoint: RedisEndpoint) -> None:
    """Also past the retention of what ended beside it."""

    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "waits", target="nobody's")
        for number in range(30):
            await submit(queue, f"r{number}")
            await queue.finish(await claimed(queue), Status.COMPLETED, result=b"x", run_seconds=1)
        deadline = asyncio.get_running_loop().time() + 10
        while await redis.exists(keys.request("r29")) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for number in range(3):
            await submit(queue, f"later{number}")
            await queue.finish(await claimed(queue), Status.COMPLETED, result=b"x", run_seconds=1)
        listed = {name.decode() for name in await redis.zrange(keys.user("ann"), 0, -1)}
        assert listed == {"waits", "later0", "later1", "later2"}

    scenario(endpoint, story, retention_seconds=2)


def test_the_events_of_a_request_are_bounded_and_its_end_is_kept(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        for number in range(2500):
            await queue.note(["r1"], Status.PROVISIONING, f"news {number}")
        await queue.withdraw("r1", "ann", "Cancelled.")
        found = await statuses(redis, "r1")
        assert len(found) < 2300
        assert found[-1] is Status.ERROR

    scenario(endpoint, story, log_lines=10)


def test_the_same_submission_twice_is_one_request(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        await submit(queue, "r1")
        assert await queue.waiting() == {TARGET: 1}

    scenario(endpoint, story)


def test_a_redis_without_memory_is_one_that_takes_no_writes_and_loses_nothing(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        got = await claimed(queue)
        await redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(ReadOnlyError):
                await redis.set("plain", b"")
            with pytest.raises(ReadOnlyError):  # a script words it otherwise
                await submit(queue, "r2")
            with pytest.raises(ReadOnlyError):
                await queue.finish(got, Status.COMPLETED, result=b"answer")
        finally:
            await redis.config_set("maxmemory", 0)
        await queue.finish(got, Status.COMPLETED, result=b"answer")
        assert (await statuses(redis, "r1"))[-1] is Status.COMPLETED
        assert await queue.describe("r2") is None

    scenario(endpoint, story)


def test_users_take_turns_and_a_newcomer_does_not_wait_for_a_burst(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        for n in range(6):
            await submit(queue, f"ann-{n}", declared_seconds=10)
        for _ in range(2):
            await queue.finish(await claimed(queue), Status.COMPLETED, run_seconds=10)
        for n in range(2):
            await submit(queue, f"bob-{n}", "bob", declared_seconds=10)
        order = []
        for _ in range(6):
            got = await claimed(queue)
            order.append(got.request_id)
            await queue.finish(got, Status.COMPLETED, run_seconds=10)
        assert order == ["bob-0", "ann-2", "bob-1", "ann-3", "ann-4", "ann-5"]

    scenario(endpoint, story)


def test_priority_goes_first(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "normal")
        await submit(queue, "urgent", "bob", priority=9)
        assert (await claimed(queue)).request_id == "urgent"
        assert (await claimed(queue)).request_id == "normal"

    scenario(endpoint, story)


def test_what_does_not_fit_the_remaining_time_is_left_for_others(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "long", declared_seconds=100)
        await submit(queue, "short", declared_seconds=5)
        got = await claim(queue, remaining_seconds=10)
        assert got is not None
        assert got.request_id == "short"
        assert await claim(queue, remaining_seconds=10) is None
        assert (await claimed(queue)).request_id == "long"

    scenario(endpoint, story)


def test_an_attempt_that_lost_its_lease_can_write_nothing(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        first = await queue.claim("w1", [TARGET], lease_seconds=0.0)
        assert first is not None
        await queue.sweep(LEASE, 1000.0)
        await redis.hset(keys.SWEEP, "hold_until", 0)
        assert (await queue.sweep(0.0, 1000.0)).reclaimed == 1
        second = await claimed(queue, "w2")
        assert second.attempt == 2
        assert await queue.renew([first, second], LEASE) == [Verdict.LOST, Verdict.OK]
        for write in (
            queue.event(first, Step(9, Status.LOG, "late")),
            queue.finish(first, Status.COMPLETED, result=b"stale"),
        ):
            with pytest.raises(LeaseLost):
                await write
        assert await queue.release(first, Release.HANDBACK, "late") == "lost"
        await queue.finish(second, Status.COMPLETED, result=b"right")
        await queue.finish(second, Status.COMPLETED, result=b"again")
        assert await queue.result("r1") == b"right"
        assert (await statuses(redis, "r1")).count(Status.COMPLETED) == 1

    scenario(endpoint, story)


def test_three_losses_end_a_request_with_the_cause(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        for _ in range(2):
            assert await queue.release(await claimed(queue), Release.LOSS, "the model host died") == "queued"
        assert await queue.release(await claimed(queue), Release.LOSS, "the model host died") == "ended"
        described = await queue.describe("r1")
        assert described is not None
        assert described["status"] == "ERROR"
        assert "the model host died" in described["description"]

    scenario(endpoint, story)


def test_handing_back_costs_nothing_and_comes_first(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        await submit(queue, "r2")
        for _ in range(5):
            got = await claimed(queue)
            assert got.request_id == "r1"
            assert await queue.release(got, Release.HANDBACK, "draining") == "queued"

    scenario(endpoint, story)


def test_nothing_is_reclaimed_after_a_silence_before_workers_could_renew(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        got = await queue.claim("w1", [TARGET], lease_seconds=0.0)
        assert got is not None
        for _ in range(2):
            swept = await queue.sweep(LEASE, 1.0)
            assert (swept.reclaimed, swept.dead, swept.overdue) == (0, 0, 0)
            assert swept.due_seconds is not None
            assert LEASE - 5 < swept.due_seconds <= LEASE
        assert await queue.renew([got], LEASE) == [Verdict.OK]

    scenario(endpoint, story)


def test_cancelling_what_waits_and_what_runs(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "waits")
        assert await queue.withdraw("waits", "bob", "Cancelled.") == "unknown"
        assert await queue.withdraw("waits", "ann", "Cancelled.") == "ended"
        assert await queue.withdraw("waits", "ann", "Cancelled.") == "done"
        assert await claim(queue) is None
        await submit(queue, "runs")
        got = await claimed(queue)
        assert await queue.withdraw("runs", "ann", "Cancelled.") == "told"
        assert await queue.renew([got], LEASE) == [Verdict.CANCEL]

    scenario(endpoint, story)


def test_waiting_too_long_ends_with_a_sentence(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        await asyncio.sleep(0.05)
        assert (await queue.sweep(LEASE, 1.0)).overdue == 1
        assert (await statuses(redis, "r1"))[-1] == Status.ERROR
        described = await queue.describe("r1")
        assert described is not None
        assert described["description"] == "No worker took the request within 0 s; submit it again."
        assert await queue.waiting() == {}

    scenario(endpoint, story, queue_seconds=0.01)


def test_it_is_known_how_long_the_oldest_of_each_target_waits(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        assert await queue.oldest() == {}
        await submit(queue, "old")
        await submit(queue, "young")
        await submit(queue, "other", target="model-b")
        await redis.zincrby(keys.WAITING_SINCE, -60_000, "old")
        waited = await queue.oldest()
        assert 60 <= waited[TARGET] < 70
        assert 0 <= waited["model-b"] < 10
        assert (await claimed(queue)).request_id == "old"
        assert (await queue.oldest())[TARGET] < 10

    scenario(endpoint, story)


def test_the_quota_counts_what_is_open(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        await submit(queue, "r2")
        with pytest.raises(QuotaExceeded):
            await submit(queue, "r3")
        await queue.finish(await claimed(queue), Status.COMPLETED)
        await submit(queue, "r3")

    scenario(endpoint, story, open_requests=2)


def test_log_lines_have_a_limit_and_a_repeated_event_is_written_once(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        got = await claimed(queue)
        for n in range(1, 7):
            await queue.event(got, Step(n, Status.LOG, f"line {n}"))
            await queue.event(got, Step(n, Status.LOG, f"line {n}"))
        assert (await statuses(redis, "r1")).count(Status.LOG) == 4
        last = (await Events(redis).read({"r1": "0-0"}))["r1"][-1]
        assert last.description == "Further printed lines are dropped: the limit is 3."

    scenario(endpoint, story, log_lines=3)


def test_the_terminal_status_brings_what_is_not_written_yet_and_repeats_nothing(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await submit(queue, "r1")
        got = await claimed(queue)
        steps = [Step(1, Status.RUNNING), Step(2, Status.LOG, "one"), Step(3, Status.LOG, "two")]
        await queue.event(got, *steps[:2])
        for _ in range(2):
            await queue.finish(got, Status.COMPLETED, result=b"x", steps=steps)
        assert (await statuses(redis, "r1"))[2:] == [Status.RUNNING, Status.LOG, Status.LOG, Status.COMPLETED]

    scenario(endpoint, story)


def test_a_refused_request_is_recorded_as_ended(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await queue.submit(Submission("r1", "ann", TARGET, "trace", {}), refusal="There is no such model.")
        assert await statuses(redis, "r1") == [Status.RECEIVED, Status.ERROR]
        assert await claim(queue) is None

    scenario(endpoint, story)


def test_a_bell_names_the_session_only_to_its_owner(endpoint: RedisEndpoint) -> None:
    async def story(queue: Queue, redis: Redis) -> None:
        await redis.set(keys.session("s1"), "ann")
        heard: list[str] = []
        ready = asyncio.Event()

        async def listen() -> None:
            async for _, message in Events(redis).listen(keys.BELL_REQUESTS):
                ready.set()
                heard.append(message)

        task = asyncio.create_task(listen())
        await ready.wait()
        await submit(queue, "r1", session="s1")
        await submit(queue, "r2", "bob", session="s1")
        while len(heard) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        assert heard == ["", "r1 s1", "r2"]

    scenario(endpoint, story)
