"""What the fleet decides: a pure function, so every case is a table row."""

from __future__ import annotations

import pytest

from edif_hpc.core.registry import ModelRecord, WorkerRecord
from edif_hpc.fleet.decide import ALLOCATIONS, DEEP_QUEUE, PROCESSES, Launched, Pool, Target, decide

pytestmark = pytest.mark.fast

KEY = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "org/model", "revision": null, "task": null}'
NOW = 1000.0


def target(waiting: int = 1, waited: float = 0.0) -> Target:
    return Target(KEY, "org/model", waiting, waited)


def worker(name: str = "worker-1", *, state: str = "serving", running: int = 0, **models: str) -> WorkerRecord:
    """A worker; `models` are states of the target's model ("model") or of others."""
    records = [
        ModelRecord(
            model_key=KEY if key == "model" else key, state=value, error="no memory" if value == "failed" else ""
        )
        for key, value in models.items()
    ]
    return WorkerRecord(
        worker_id=name, version="1", host="h", pid=1, started=0.0, state=state, running=running, models=records
    )


def test_nobody_waits_nothing_happens():
    decision = decide([], [], [Pool("local", 1)], NOW)
    assert not decision.launch
    assert not decision.notes
    assert not decision.refusals


def test_a_waiting_request_launches_one_worker_and_hears_of_it():
    decision = decide([target(5)], [], [Pool("local", 3)], NOW)
    assert decision.launch == ["local"]
    assert "started" in decision.notes[KEY]


def test_two_targets_launch_one_worker_at_a_time():
    other = Target("other", "org/other", 1)
    assert decide([target(), other], [], [Pool("local", 3)], NOW).launch == ["local"]


def test_while_a_worker_starts_no_other_is_launched():
    pool = Pool("local", 3, launched=[Launched("worker-1", NOW - 1)])
    decision = decide([target()], [], [pool], NOW)
    assert not decision.launch
    assert decision.notes[KEY] == "A worker is starting."


def test_while_one_is_being_launched_nobody_launches_another():
    """Slurm may take its time to say that it took a submission."""
    pool = Pool("slurm", 3, least=2, asked=True, launching=True)
    decision = decide([target()], [], [pool], NOW)
    assert not decision.launch
    assert decision.notes[KEY] == "A worker is starting."


@pytest.mark.parametrize(
    "present", [worker(model="ready"), worker(model="loading"), worker(), worker(state="starting")]
)
def test_a_live_worker_that_has_or_can_load_the_model_is_enough(present: WorkerRecord):
    pool = Pool("local", 3, launched=[Launched("worker-1", 0.0)])
    decision = decide([target()], [present], [pool], NOW)
    assert not decision.launch
    assert not decision.notes


def test_a_worker_busy_with_another_model_gets_company_while_there_is_room():
    busy = worker(running=1, other="ready")
    launched = [Launched("worker-1", 0.0)]
    assert decide([target()], [busy], [Pool("local", 2, launched=launched)], NOW).launch == ["local"]
    alone = decide([target()], [busy], [Pool("local", 1, launched=launched)], NOW)
    assert not alone.launch
    assert not alone.refusals


def test_a_deep_queue_is_worth_another_worker():
    pool = Pool("local", 2, launched=[Launched("worker-1", 0.0)])
    holder = worker(running=1, model="ready")
    assert not decide([target(DEEP_QUEUE)], [holder], [pool], NOW).launch
    assert decide([target(DEEP_QUEUE + 1)], [holder], [pool], NOW).launch == ["local"]


def test_a_long_wait_for_busy_workers_is_worth_another_one():
    pool = Pool("local", 2, launched=[Launched("worker-1", 0.0)])
    long = PROCESSES.wait_seconds + 1
    holder = worker(running=1, model="ready")
    assert not decide([target(waited=long - 2)], [holder], [pool], NOW).launch
    assert decide([target(waited=long)], [holder], [pool], NOW).launch == ["local"]
    allocations = Pool("main", 2, launched=[Launched("worker-1", 0.0)], patience=ALLOCATIONS)
    assert not decide([target(waited=long)], [holder], [allocations], NOW).launch


@pytest.mark.parametrize("present", [worker("worker-2"), worker("worker-2", model="loading")])
def test_a_long_wait_for_a_worker_that_comes_is_worth_none(present: WorkerRecord):
    pool = Pool("local", 3, launched=[Launched("worker-1", 0.0), Launched("worker-2", 0.0)])
    holder = worker(running=1, model="ready")
    assert not decide([target(waited=3600.0)], [holder, present], [pool], NOW).launch


def test_an_admin_may_ask_for_a_worker_within_the_pools_bounds():
    assert decide([], [], [Pool("local", 1, asked=True)], NOW).launch == ["local"]
    assert not decide([], [], [Pool("local", 0, asked=True)], NOW).launch
    assert not decide([], [], [Pool("local", 1, asked=True, stopped=True)], NOW).launch
    young = Pool("local", 1, asked=True, deaths=1, last_death=NOW)
    assert not decide([], [], [young], NOW).launch
    assert decide([], [], [young], NOW + 100).launch == ["local"]


def test_a_draining_worker_is_none_that_starts():
    pool = Pool("local", 2, launched=[Launched("worker-1", NOW - 100)])
    assert decide([target()], [worker(state="draining", model="ready")], [pool], NOW).launch == ["local"]


def test_a_draining_worker_serves_nobody():
    pool = Pool("local", 2, launched=[Launched("worker-1", 0.0), Launched("worker-2", 0.0)])
    decision = decide([target()], [worker(state="draining", model="ready"), worker("worker-2")], [pool], NOW)
    assert not decision.launch


@pytest.mark.parametrize("deaths", range(1, len(PROCESSES.backoff_seconds) + 1))
def test_early_deaths_back_off(deaths: int):
    pause = PROCESSES.backoff_seconds[deaths - 1]
    early = Pool("local", 1, deaths=deaths, last_death=NOW - pause + 0.5, cause="no kernel")
    decision = decide([target()], [], [early], NOW)
    assert not decision.launch
    assert "no kernel" in decision.notes[KEY]
    late = Pool("local", 1, deaths=deaths, last_death=NOW - pause, cause="no kernel")
    assert decide([target()], [], [late], NOW).launch == ["local"]


def test_too_many_early_deaths_pause_the_pool_and_end_the_wait():
    deaths = len(PROCESSES.backoff_seconds) + 1
    paused = Pool("local", 1, deaths=deaths, last_death=NOW - 1, cause="no kernel")
    decision = decide([target()], [], [paused], NOW)
    assert not decision.launch
    assert "no kernel" in decision.refusals[KEY]
    again = Pool("local", 1, deaths=deaths, last_death=NOW - PROCESSES.pause_seconds, cause="no kernel")
    assert decide([target()], [], [again], NOW).launch == ["local"]


def test_a_paused_pool_refuses_nobody_whom_a_worker_serves():
    paused = Pool("local", 2, deaths=9, last_death=NOW - 1, launched=[Launched("worker-1", 0.0)])
    decision = decide([target()], [worker(model="ready")], [paused], NOW)
    assert not decision.refusals


def test_a_model_that_no_worker_could_load_is_refused_with_the_reason():
    pool = Pool("local", 1, launched=[Launched("worker-1", 0.0)])
    decision = decide([target()], [worker(model="failed")], [pool], NOW)
    assert decision.refusals[KEY] == "no memory"


def test_a_model_of_no_pool_is_refused():
    decision = decide([target()], [], [Pool("local", 1, models=["other/*"])], NOW)
    assert decision.refusals[KEY] == "No pool of this service serves org/model."


def test_without_workers_allowed_a_request_is_told_and_waits_for_one_started_by_hand():
    decision = decide([target()], [], [Pool("local", 0)], NOW)
    assert "may have 0" in decision.notes[KEY]
    assert not decision.refusals


def test_a_pool_keeps_its_least_workers_also_when_nobody_asks():
    assert decide([], [], [Pool("main", 3, least=2)], NOW).launch == ["main"]
    started = (Launched("worker-1", NOW), Launched("worker-2", NOW))
    assert decide([], [], [Pool("main", 3, least=2, launched=started)], NOW).launch == []


def test_a_stopped_pool_starts_nothing_and_says_so():
    decision = decide([target()], [], [Pool("main", 1, least=1, stopped=True)], NOW)
    assert decision.launch == []
    assert "an admin stopped it" in decision.notes[KEY]


def test_while_slurm_is_silent_nothing_is_started_and_nobody_is_refused():
    decision = decide([target()], [], [Pool("main", 1, least=1, trouble="squeue did not answer within 60 s.")], NOW)
    assert (decision.launch, decision.refusals) == ([], {})
    assert "until Slurm answers (squeue did not answer within 60 s)" in decision.notes[KEY]


def test_who_waits_for_a_pending_allocation_is_told_slurms_reason():
    waiting = Pool("main", 1, launched=(Launched("worker-1", NOW),), pending="Priority")
    assert "waits in Slurm (Priority)" in decide([target()], [], [waiting], NOW).notes[KEY]


def test_allocations_that_fail_are_waited_for_longer_than_processes():
    failed = Pool("main", 1, deaths=1, last_death=NOW, cause="no image", patience=ALLOCATIONS)
    decision = decide([target()], [], [failed], NOW + 59)
    assert decision.launch == []
    assert "no image" in decision.notes[KEY]
    assert decide([target()], [], [failed], NOW + 60).launch == ["main"]


def test_while_slurm_is_silent_a_pools_own_cause_comes_first():
    pool = Pool("slurm", 1, deaths=1, last_death=NOW, cause="Invalid partition.", trouble="squeue failed.")
    assert decide([target()], [], [pool], NOW).notes[KEY] == (
        "The last worker ended early (Invalid partition). Nothing can be started until Slurm answers (squeue failed)."
    )
