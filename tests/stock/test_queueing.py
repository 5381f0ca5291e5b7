"""Waiting in line as its users see it: their place, their share, and a way out of it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteError
from nnsight.schema.response import Status

from tests.support.servers import eventually
from tests.support.stack import Stack

from .support import PROMPT, ask, backend, cancel, error_of, key_of, occupied, reached, result_of, sleeping, works

MANY = 30


def first_word(model: Any, **options: Any) -> tuple[str, Any]:
    """The first status of a request, and what goes on with it."""
    running = ask(model, 1, AsyncRemoteBackend, **options)

    async def one() -> Any:
        return await running.receive()

    first = asyncio.run(one())
    assert first.status is Status.QUEUED
    return first.description, running


def test_queued_tells_the_place_and_the_start(stack: Stack, gpt2: Any) -> None:
    works(gpt2)  # so that the time of a run is known
    with occupied(stack, gpt2):
        waiting = [first_word(gpt2) for _ in range(3)]
        texts = [text for text, _ in waiting]
        # One request may be claimed ahead of its turn, so the places begin at 1 or stay one behind.
        places = [int(re.search(r"[Pp]lace (\d+) in the queue", text).group(1)) for text in texts]
        assert places[0] == 1
        assert places == sorted(places)
        assert places[-1] >= 2
        assert all("expected to start in about" in text.lower() for text in texts[1:]), texts
    for _, running in waiting:
        assert float(asyncio.run(running.resolve())["answer"]) == 1


def test_a_queued_request_can_be_cancelled(stack: Stack, gpt2: Any) -> None:
    with occupied(stack, gpt2):
        behind = [ask(gpt2, n, blocking=False) for n in range(3)]
        cancel(stack, behind[1].job_id)
        assert "ancelled" in error_of(behind[1])
    assert float(result_of(behind[0])["answer"]) == 0
    assert float(result_of(behind[2])["answer"]) == 2


def test_a_running_request_can_be_cancelled(stack: Stack, gpt2: Any) -> None:
    running = sleeping(gpt2)
    reached(running, "RUNNING")
    cancel(stack, running.job_id)
    assert "ancelled" in error_of(running)
    works(gpt2)


def test_a_blocking_client_hears_that_it_was_cancelled(stack: Stack, gpt2: Any) -> None:
    async def main() -> None:
        running = backend(gpt2, AsyncRemoteBackend)
        with occupied(stack, gpt2):
            with gpt2.trace(PROMPT, backend=running):
                answer = gpt2.lm_head.output.save()  # noqa: F841
            first = await running.receive()
            cancel(stack, first.id)
            await running.resolve()

    with pytest.raises(RemoteError, match="ancelled"):
        asyncio.run(main())
    works(gpt2)


def test_cancelling_what_has_ended_changes_nothing(stack: Stack, gpt2: Any) -> None:
    ended = ask(gpt2, 5, blocking=False)
    result_of(ended)
    stack.cli("cancel", str(ended.job_id), check=False)
    assert float(result_of(ended)["answer"]) == 5


def test_one_request_of_another_user_does_not_wait_for_all_of_mine(stack: Stack, gpt2: Any) -> None:
    """Thirty of mine wait first, each of a tenth of a second; the other user's blocking one comes last."""
    with occupied(stack, gpt2):
        mine = [sleeping(gpt2, 0.1, blocking=False) for _ in range(MANY)]
        other = backend(gpt2, AsyncRemoteBackend, api_key=key_of(stack, "late"))
        with gpt2.trace(PROMPT, backend=other):
            answer = (gpt2.lm_head.output[0, -1].sum() * 0 + 3).save()  # noqa: F841
    result = asyncio.run(other.resolve())
    mine[-1].poll()
    assert mine[-1].status is not Status.COMPLETED
    assert float(result["answer"]) == 3
    for request in mine:
        result_of(request)


def test_a_client_that_leaves_does_not_cancel(stack: Stack, gpt2: Any) -> None:
    with occupied(stack, gpt2):
        running = ask(gpt2, 6, AsyncRemoteBackend)

        async def one() -> Any:
            return await running.receive()

        first = asyncio.run(one())
        running.close()
    again = backend(gpt2, blocking=False, job_id=first.id)
    assert float(eventually(again, 30, "the result")["answer"]) == 6
