"""How one row of the table is held against a service, and what is true of every service whatever is sent to it.

The test modules are one per level, so that they can run side by side.
"""

from __future__ import annotations

import re
import zipfile
from contextlib import suppress
from io import BytesIO
from typing import Any

import httpx
import psutil
import pytest
import torch
import zstandard
from nnsight.intervention.backends.remote import RemoteError

from tests.isolation import client, ends, leftovers, lies, reach
from tests.isolation.ground import Ground
from tests.isolation.table import LOCKED, Case

assert all((reach, ends, lies, leftovers))  # importing them fills the table


def hold(case: Case, ground: Ground, model: Any, expected: torch.Tensor, another_user: str) -> None:
    """Attack, look, and ask honestly."""
    if "canary" in case.name:
        client.leave_a_canary(ground, model, another_user)
    said = client.outcome(model, case, ground.told())
    assert re.match(case.expected[ground.level], said, re.DOTALL), said
    if case.after is not None:
        case.after(ground, ground.level, said)
    if ground.level in case.spoils:
        assert not torch.equal(client.numbers(model, remote=True), expected), "the table promises too little"
        with pytest.raises(RemoteError):
            client.bare(model, ends.leave_at_once, {})
    assert_honest(model, expected, ground.level)


def assert_honest(model: Any, expected: torch.Tensor, level: str) -> None:
    """An ordinary request gives the right numbers, at the level that was promised."""
    with model.trace(client.PROMPT, remote=True) as tracer:
        logits = model.lm_head.output.clone().save()
    assert torch.equal(logits, expected)
    assert tracer.backend.meta["isolation"] == level


def hold_the_pickles(ground: Ground, model: Any) -> None:
    """Neither gateway nor agent unpickles a result, on either side of the inline limit, or a payload.

    What unpickles these leaves its pid in a file. The result is downloaded and never unpickled here either.
    """
    mark = ground.mark("unpickled")
    for size in (1, 3 * 2**20):
        packed = client.unpacked_by_nobody(model, client.trap, {"mark": str(mark), "padding": "x" * size})
        plain = zstandard.ZstdDecompressor().decompress(packed)
        with zipfile.ZipFile(BytesIO(plain)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            assert str(mark).encode() in archive.read(name)
        assert not mark.exists()
    sprung = client.Trap(str(mark))
    if ground.level == LOCKED:  # the file cannot be written there
        with pytest.raises(RemoteError, match=r"may not read here|cannot be turned back into a block"):
            client.carry(model, sprung)
        assert not mark.exists()
    else:
        client.carry(model, sprung)
        others = {pid for name, pid in ground.records().items() if name != "host"}
        assert int(mark.read_text()) not in others
        mark.unlink()


def hold_the_secrets(ground: Ground) -> None:
    """No secret of the home is in an argument list or an environment, which other users or blocks may read."""
    secrets = [
        path.read_text().strip() for path in (ground.stack.home / "secrets").iterdir() if path.stat().st_size < 200
    ]
    assert len(secrets) > 3
    looked = 0
    for pid in {*ground.records().values(), *ground.model_processes().values(), *ground.executors()}:
        with suppress(psutil.NoSuchProcess):  # an executor that just ended
            process = psutil.Process(pid)
            told = " ".join(process.cmdline())
            if ground.stack.uid is not None:  # the tests run as root, who may look
                told += " ".join(f"{name}={value}" for name, value in process.environ().items())
            assert not [secret for secret in secrets if secret and secret in told]
            looked += 1
    assert looked > 5


def hold_the_requests_apart(ground: Ground, model: Any, another_user: str) -> None:
    """Knowing the id of somebody's request is of no use."""
    mine = client.backend(model, blocking=False)
    with model.trace(client.PROMPT, backend=mine):
        kept = model.lm_head.output.sum().save()  # noqa: F841
    client.raw_result(mine)
    theirs = {"ndif-api-key": another_user}
    answer = httpx.get(f"{mine.host}/response/{mine.job_id}", headers=theirs, timeout=30)
    assert answer.json()["status"] == "ERROR"
    assert not answer.json()["data"]
    assert httpx.get(f"{mine.host}/api/requests/{mine.job_id}", headers=theirs, timeout=30).status_code == 404
    cancelled = httpx.post(f"{mine.host}/api/requests/{mine.job_id}/cancel", headers=theirs, timeout=30)
    assert cancelled.status_code == 404
