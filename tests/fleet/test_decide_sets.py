"""What the fleet decides for requests that need several models, or a certain pool."""

from __future__ import annotations

import pytest

from edif_hpc.core.registry import ModelRecord, WorkerRecord
from edif_hpc.fleet.decide import Launched, Pool, Target, decide

pytestmark = pytest.mark.fast

NOW = 1000.0
BOTH = Target("a\nb", "org/a + org/b", 1, repo_ids=("org/a", "org/b"), models=("a", "b"))


def worker(pool: str = "large", running: int = 0, unable: str = "", **models: str) -> WorkerRecord:
    records = [ModelRecord(model_key=key, state=state, error="damaged") for key, state in models.items()]
    return WorkerRecord(
        worker_id=f"worker-{pool}", version="1", host="h", pid=1, started=0.0, state="serving", pool=pool,
        running=running, models=records, unable={BOTH.key: unable} if unable else {},
    )  # fmt: skip


def test_only_a_pool_that_serves_all_of_them_is_asked():
    pools = [Pool("some", 1, models=["org/a"]), Pool("large", 1, models=["org/*"])]
    assert decide([BOTH], [], pools, NOW).launch == ["large"]
    refused = decide([BOTH], [], pools[:1], NOW)
    assert refused.refusals == {BOTH.key: "No pool of this service serves org/a + org/b."}


def test_a_worker_that_holds_one_and_has_room_is_enough():
    launched = [Launched("worker-large", NOW)]
    assert not decide([BOTH], [worker(a="ready")], [Pool("large", 2, launched=launched)], NOW).launch
    assert not decide(
        [BOTH], [worker(a="ready", b="loading", running=1)], [Pool("large", 2, launched=launched)], NOW
    ).launch
    busy = decide([BOTH], [worker(a="ready", running=1)], [Pool("large", 2, launched=launched)], NOW)
    assert busy.launch == ["large"]


def test_a_worker_that_cannot_hold_them_has_others_like_it_not_started():
    small, large = Pool("small", 3, launched=[Launched("worker-small", NOW)]), Pool("large", 1)
    seen = [worker("small", unable="They need 9 GiB together, and this worker has 8.")]
    assert decide([BOTH], seen, [small, large], NOW).launch == ["large"]
    alone = decide([BOTH], seen, [small], NOW)
    assert not alone.launch
    assert alone.refusals == {BOTH.key: "They need 9 GiB together, and this worker has 8."}


def test_a_set_waits_for_the_larger_pool_while_that_has_no_room():
    small = Pool("small", 3, launched=[Launched("worker-small", NOW)])
    full, stopped = Pool("large", 1, launched=[Launched("worker-large", NOW)]), Pool("large", 1, stopped=True)
    lesser = worker("small", unable="They need 9 GiB together, and this worker has 8.")
    for seen, large in (([lesser, worker(c="ready", running=1)], full), ([lesser], stopped)):
        decision = decide([BOTH], seen, [small, large], NOW)
        assert not decision.launch
        assert not decision.refusals


def test_one_that_failed_fails_the_set():
    seen = [worker(a="ready", b="failed")]
    decision = decide([BOTH], seen, [Pool("large", 1, launched=[Launched("worker-large", NOW)])], NOW)
    assert decision.refusals == {BOTH.key: "damaged"}


def test_a_request_for_a_pool_waits_for_that_pool():
    target = Target("a\npool large", "org/a", 1, repo_ids=("org/a",), models=("a",), pool="large")
    seen = [worker("small", a="ready")]
    small, large = Pool("small", 1, launched=[Launched("worker-small", NOW)]), Pool("large", 1)
    assert decide([target], seen, [small, large], NOW).launch == ["large"]
    assert not decide([target], [worker("large", a="ready")], [small, large], NOW).launch
