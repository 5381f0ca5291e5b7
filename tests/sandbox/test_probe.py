"""What is found out about the machine, and what is said when something is missing."""

from __future__ import annotations

import pytest

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.sandbox import Policy, Reach, SandboxError, enter, probe
from edif_hpc.worker.sandbox.enter import refuse_unreachable

pytestmark = pytest.mark.fast


def test_it_asks_the_kernel_once_and_prints() -> None:
    reach = probe()
    assert probe() is reach
    assert reach.no_new_privs
    lines = reach.lines()
    assert lines[0] == f"strongest isolation level: {reach.level.value}"
    assert all(line and "\n" not in line for line in lines)
    assert (reach.level is Isolation.LOCKED) == (reach.landlock_abi > 0 and reach.seccomp)


@pytest.mark.parametrize(
    ("missing", "kept_from"),
    [
        ({"landlock": False}, "Landlock"),
        ({"seccomp": False}, "seccomp"),
        ({"landlock": False, "seccomp": False}, "both"),
    ],
)
def test_without_one_of_the_two_the_level_is_process(missing: dict[str, bool], kept_from: str) -> None:
    reach = probe(**missing)
    assert reach.level is Isolation.PROCESS
    named = [name for name in ("Landlock", "seccomp") if any(reason.startswith(name) for reason in reach.reasons)]
    assert named == ([kept_from] if kept_from != "both" else ["Landlock", "seccomp"])
    assert reach.landlock_abi == 0 or "landlock" not in missing
    with pytest.raises(SandboxError) as refusal:
        refuse_unreachable(Policy(level=Isolation.LOCKED), reach)
    assert str(refusal.value).startswith("Isolation level locked cannot be reached here, the strongest is process")
    assert all(reason in str(refusal.value) for reason in reach.reasons)


def test_nothing_at_all_is_refused_before_anything_happens() -> None:
    bare = Reach(0, False, False, False, False, False, Isolation.NONE, ("There is nothing.",))
    with pytest.raises(SandboxError, match=r"process cannot be reached .* There is nothing\."):
        enter(Policy(level=Isolation.PROCESS), bare)
    with pytest.raises(SandboxError, match="none has nothing to enter"):
        enter(Policy(level=Isolation.NONE), probe())
