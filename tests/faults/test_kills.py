"""Each component is killed once, in a state that was seen, with forty requests in flight: all are answered, once."""

from __future__ import annotations

import psutil
import pytest
from botocore.exceptions import ClientError
from redis import Redis

from edif_hpc.core.endpoints import redis_endpoint, store_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.queue import keys
from edif_hpc.core.settings import Settings
from edif_hpc.core.store import RESULTS, Store
from tests.delivery.scene import PATIENCE, events, pids, soon
from tests.stock import support
from tests.support.stack import Stack

from .conftest import gate_of
from .flight import BLOCKING, Block, Flight
from .scene import executor_of, given_up, gone, host_of, kill, lost, paused, worker_of

NOTHING_LEFT = 0


def test_the_gateway(flight: Flight, stack: Stack) -> None:
    flight.when("RUNNING")
    kill(stack, "gateway")
    flight.land()
    assert flight.left() == BLOCKING, "their sockets were the gateway's"


def test_the_fleet(flight: Flight, stack: Stack) -> None:
    flight.when("RUNNING")
    kill(stack, "fleet")
    flight.land()
    assert flight.left() == NOTHING_LEFT


def test_redis(flight: Flight, stack: Stack) -> None:
    flight.when("RUNNING")
    kill(stack, "redis")
    flight.land()
    assert flight.left() == NOTHING_LEFT


def test_the_object_store(flight: Flight, stack: Stack) -> None:
    flight.when("RUNNING")
    kill(stack, "store")
    flight.land()


def test_a_worker_between_its_claim_and_the_run(stack: Stack, blocks: list[Block]) -> None:
    """Its model host stands still, so nothing that it claims begins."""
    support.works(support.tiny())
    with paused(host_of(stack)):
        flight = Flight(stack, blocks, gate_of(stack))
        (claimed, *_) = flight.when("DISPATCHED")
        gone(worker_of(stack))
    flight.land()
    assert flight.left() == NOTHING_LEFT
    assert lost(stack, claimed.client.accepted)


def test_a_model_host(flight: Flight, stack: Stack) -> None:
    flight.when("RUNNING")
    gone(host_of(stack))
    flight.land()
    assert flight.left() == NOTHING_LEFT


def test_a_zygote_that_is_being_made_ready(flight: Flight, stack: Stack) -> None:
    """What loads is killed twice, and the model is there in the end."""
    flight.when("RUNNING")
    gone(host_of(stack))
    for _ in range(2):
        gone(soon(stack, lambda: new_zygote(stack), PATIENCE, "a zygote that is not ready"))
    flight.land()
    assert flight.left() == NOTHING_LEFT


def test_an_executor(flight: Flight, stack: Stack) -> None:
    (running, *_) = flight.when("RUNNING")
    gone(executor_of(stack, running))
    flight.land()
    assert flight.left() == NOTHING_LEFT
    assert any("Back in the queue" in text for _, text, _ in events(stack, running.client.accepted))


@pytest.mark.parametrize("victim", ["worker", "store"])
def test_between_an_upload_and_completed(flight: Flight, stack: Stack, victim: str) -> None:
    """The store stands still until an upload has begun, and Redis from then on: COMPLETED cannot be written."""
    home = Home(stack.home)
    store = Store(store_endpoint(home, Settings()))
    before = pids(stack)
    flight.when("RUNNING")
    with Redis.from_url(redis_endpoint(home, Settings()).with_credentials()) as redis:
        known = set(redis.zrange(keys.OBJECTS, 0, -1))
        with paused(before["store"]):
            flight.gate.touch()
            soon(stack, lambda: set(redis.zrange(keys.OBJECTS, 0, -1)) - known, PATIENCE, "an upload's beginning")
            new = (set(redis.zrange(keys.OBJECTS, 0, -1)) - known).pop().decode()
            held = paused(before["redis"])
            held.__enter__()
    try:
        assert new.startswith(RESULTS)
        soon(stack, lambda: is_there(store, new), PATIENCE, "the upload's end")
        if victim == "worker":
            gone(worker_of(stack))
        else:
            kill(stack, "store")
    finally:
        held.__exit__(None, None, None)
    flight.land()


def test_a_worker_that_was_given_up_for_dead_says_nothing_more(flight: Flight, stack: Stack) -> None:
    (running, *_) = flight.when("RUNNING")
    with given_up(stack, running):
        flight.gate.touch()
    flight.land()
    assert flight.left() == NOTHING_LEFT


def new_zygote(stack: Stack) -> int | None:
    """A zygote that has no executors yet."""
    for host in psutil.Process(worker_of(stack)).children():
        for zygote in host.children():
            if not zygote.children():
                return zygote.pid
    return None


def is_there(store: Store, key: str) -> bool:
    try:
        store.client.head_object(Bucket=store.endpoint.bucket, Key=key)
    except ClientError:
        return False
    return True
