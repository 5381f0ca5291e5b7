"""Requests that need several models: when a worker asks for them, whether it can hold them, and what it then keeps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edif_hpc.core.errors import ModelError
from edif_hpc.core.isolation import Isolation
from edif_hpc.core.settings import Settings
from edif_hpc.core.target import Target
from edif_hpc.core.wire import ALLOWED_CLASSES, ModelKey
from edif_hpc.worker.offers import SET_PATIENCE_SECONDS, offers
from edif_hpc.worker.residents import Resident, Residents, Shares

pytestmark = pytest.mark.fast

A, B, C = (ModelKey(next(iter(ALLOWED_CLASSES)), f"org/{name}", None, "text-generation") for name in "abc")
NOW = 1000.0


def resident(key: ModelKey, running: int = 0) -> Resident:
    return Resident(key, {"cpu": 1}, state="ready", running=running)


def free(each: Resident) -> bool:
    return each.running == 0


def asked(ready: list[Resident], sets: dict[Target, float], *turns: Target) -> list[str]:
    """What is asked for, in order, after these targets had their turns one after the other."""
    found = offers(ready, sets, free, {str(target): NOW + turn for turn, target in enumerate(turns)}, NOW)
    assert all([str(one.key) for one in residents] == [str(key) for key in Target.parse(target).keys]
               for target, residents in found.items())  # fmt: skip
    return [Target.parse(target).name for target in found]


def test_single_models_take_turns() -> None:
    ready = [resident(A), resident(B), resident(C, running=1)]
    assert asked(ready, {}) == ["org/a", "org/b"]
    assert asked(ready, {}, Target.of([A])) == ["org/b", "org/a"]
    assert asked(ready, {}, Target.of([A]), Target.of([B])) == ["org/a", "org/b"]


def test_a_set_is_asked_for_when_all_of_it_has_a_place_and_in_its_turn() -> None:
    both = {Target.of([A, B]): NOW}
    turns = Target.of([A]), Target.of([B])
    assert asked([resident(A), resident(B)], both, *turns) == ["org/a + org/b", "org/a", "org/b"]
    assert asked([resident(A), resident(B)], both, *turns, *both) == ["org/a", "org/b", "org/a + org/b"]
    assert asked([resident(A), resident(B, running=1)], both) == ["org/a"]
    assert asked([resident(A)], both) == ["org/a"]
    assert asked([resident(A)], {Target.of([A], "gpus"): NOW}) == ["org/a", "org/a"]


def test_a_set_that_waited_long_keeps_what_becomes_free() -> None:
    waited = {Target.of([A, B]): NOW - SET_PATIENCE_SECONDS - 1}
    assert asked([resident(A), resident(B, running=1), resident(C)], waited) == ["org/c"]
    assert asked([resident(A), resident(C)], waited) == ["org/a", "org/c"]  # B is not even here yet


class Sized(Residents):
    """A worker on which each model takes what the test says."""

    sizes: dict[ModelKey, int]

    def choices(self, key: ModelKey) -> list[Shares]:
        size = self.sizes[key]
        found = [{device: size} for device, budget in self.devices.items() if size <= budget]
        if not found:
            raise ModelError(f"The model {key.repo_id!r} is too large.")
        return found


def worker(folder: Path, devices: dict[str, int], **sizes: int) -> Sized:
    found = Sized(Settings(), folder, folder, devices, "cpu", Isolation.PROCESS)
    found.sizes = {key: sizes[key.repo_id[-1]] for key in (A, B, C) if key.repo_id[-1] in sizes}
    return found


def test_whether_a_worker_can_hold_a_set(tmp_path: Path) -> None:
    one = worker(tmp_path, {"cpu": 10}, a=6, b=4, c=5)
    assert one.why_never([A, B]) == ""
    assert "org/a and org/c need about" in one.why_never([A, C])
    two = worker(tmp_path, {"cuda:0": 10, "cuda:1": 5}, a=8, b=5, c=2)
    assert two.why_never([A, B, C]) == ""
    assert two.why_never([B, A, C]) == ""
    assert worker(tmp_path, {"cpu": 10}, a=11, b=1).why_never([A, B]) == "The model 'org/a' is too large."


def test_a_model_that_takes_more_than_was_thought_counts_as_it_is(tmp_path: Path) -> None:
    one = worker(tmp_path, {"cpu": 10}, a=6, b=4)
    one.models[str(A)] = Resident(A, {"cpu": 7}, state="ready")
    assert "need about" in one.why_never([A, B])


def test_what_is_needed_together_does_not_make_room_for_each_other(tmp_path: Path) -> None:
    one = worker(tmp_path, {"cpu": 10}, a=5, b=5, c=5)
    for key in (A, C):
        one.models[str(key)] = Resident(key, {"cpu": 5}, state="ready", ready_since=time.monotonic() - 1e6)
    one.models[str(A)].last_used = 0.0  # of the two, the one that leaves first
    assert one.room_for(B, {str(A), str(B)}, {str(A), str(B)}) is None
    assert not one.models[str(A)].retiring
    assert one.models[str(C)].retiring
