"""What can and cannot be done inside the sandbox, at each level and under each identity, held to the table.

At `process` only the identity `ordinary` is judged: which of the host's things another uid reaches is not its promise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.worker.sandbox import probe
from tests.sandbox.attempts import ANY, SECRET, TABLE, WORKS
from tests.support import models

REPO = Path(__file__).resolve().parents[2]
IDENTITIES = ["ordinary", "dropped", "root"] if os.geteuid() == 0 else ["ordinary"]
HEAVY = [
    "multiply_with_several_threads",
    "differentiate",
    "save_to_a_kept_descriptor",
    "trace_a_model",
    "trace_gradients",
    "generate",
    "numpy_and_sampling",
]
# The kernel exempts uid 0 from RLIMIT_NPROC, whatever its capabilities: one reason why `enter` gives root up.
TOLD_OF = {("root", "start_threads_without_end"): WORKS}

Outcomes = dict[str, dict[str, dict[str, str]]]
locked = pytest.mark.skipif(probe().level.value != "locked", reason="; ".join(probe().reasons))


def run(*arguments: str, **environment: str) -> Outcomes:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sandbox.runner", *arguments],
        cwd=REPO,
        env={"PATH": os.environ["PATH"], "TOKEN": SECRET, **environment},
        capture_output=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def asked(identities: list[str]) -> list[str]:
    return [word for identity in identities for word in ("--identity", identity)]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return run(*asked(IDENTITIES))


@pytest.fixture(scope="module")
def heavy_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    home = tmp_path_factory.mktemp("hf")
    hub = models.build_cache(home, ["gpt2"])
    identities = [identity for identity in IDENTITIES if identity != "root"]
    return run("--hub", str(hub), *asked(identities), HOME=str(home), HF_HOME=str(home), HF_HUB_OFFLINE="1")


@locked
@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("name", TABLE)
def test_locked(outcomes: Outcomes, name: str, identity: str) -> None:
    outcome = outcomes[identity]["locked"][name]
    wanted = TOLD_OF.get((identity, name), TABLE[name].locked)
    assert outcome.split()[0] == wanted, outcome


@pytest.mark.parametrize("name", TABLE)
def test_process(outcomes: Outcomes, name: str) -> None:
    outcome = outcomes["ordinary"]["process"][name]
    assert TABLE[name].process in (ANY, outcome.split()[0]), outcome


@locked
@pytest.mark.parametrize("name", HEAVY)
def test_honest_work_with_torch(heavy_outcomes: Outcomes, name: str) -> None:
    for identity, levels in heavy_outcomes.items():
        for level, found in levels.items():
            assert sorted(found) == sorted(HEAVY)
            assert found[name] == WORKS, f"{identity} at {level}: {found[name]}"
