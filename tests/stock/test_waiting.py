"""Every way a stock client waits for its result: blocking, polling, awaiting and iterating, alone and beside others."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG
from nnsight.schema.response import Status

from tests.support.stack import Stack

from .support import (
    FOREVER,
    ORDER,
    PROMPT,
    ask,
    backend,
    cancel,
    error_of,
    key_of,
    reached,
    result_of,
    seen_by,
    sleeping,
)

CLIENTS = 12


def test_blocking(stack: Stack, gpt2: Any) -> None:
    with gpt2.trace(PROMPT, remote=True) as tracer:
        number = (gpt2.lm_head.output[0, -1].sum() * 0 + 7).save()
        text = "and text".save()
    assert float(number) == 7
    assert text == "and text"
    assert tracer.backend.meta["runtime"] > 0


def test_polling_gives_none_until_there_is_a_result(stack: Stack, gpt2: Any) -> None:
    polled = ask(gpt2, 8, blocking=False)
    assert polled.job_id
    assert polled.status is Status.RECEIVED
    assert float(result_of(polled)["answer"]) == 8
    assert polled.status is Status.COMPLETED
    assert float(polled()["answer"]) == 8  # and again: a result stays
    assert polled.meta["runtime"] > 0


def test_polling_something_that_runs_gives_none(stack: Stack, gpt2: Any) -> None:
    polled = sleeping(gpt2)
    reached(polled, "RUNNING")
    assert polled() is None
    cancel(stack, polled.job_id)
    assert "ancelled" in error_of(polled)


def test_polling_a_failure_raises_the_traceback(stack: Stack, gpt2: Any) -> None:
    polled = backend(gpt2, blocking=False)
    with gpt2.trace(PROMPT, backend=polled):
        raise KeyError("not there")
    assert "KeyError: 'not there'" in error_of(polled)
    assert polled.status is Status.ERROR
    assert polled.meta["runtime"] > 0


def test_a_stranger_polls_nothing(stack: Stack, gpt2: Any) -> None:
    mine = ask(gpt2, 9, blocking=False)
    result_of(mine)
    theirs = RemoteBackend(mine.model_key, blocking=False, job_id=mine.job_id, api_key=key_of(stack, "stranger"))
    unknown = RemoteBackend(mine.model_key, blocking=False, job_id="0" * 32)
    sentences = []
    for polled in (theirs, unknown):
        with pytest.raises(RemoteError) as caught:
            polled.poll()
        sentences.append(str(caught.value).replace(str(polled.job_id), "ID"))
    assert sentences[0] == sentences[1]  # not even whether it exists


def test_awaiting(stack: Stack, gpt2: Any) -> None:
    async def main() -> Any:
        return await ask(gpt2, 10, AsyncRemoteBackend)

    assert float(asyncio.run(main())["answer"]) == 10


def test_awaiting_a_failure_raises(stack: Stack, gpt2: Any) -> None:
    async def main() -> Any:
        awaited = backend(gpt2, AsyncRemoteBackend)
        with gpt2.trace(PROMPT, backend=awaited):
            raise RuntimeError("made to fail")
        return await awaited

    with pytest.raises(RemoteError, match="made to fail"):
        asyncio.run(main())


def test_iterating_gives_every_status_in_order_and_the_result_last(stack: Stack, gpt2: Any) -> None:
    statuses, result = seen_by(ask(gpt2, 11, AsyncRemoteBackend))
    names = [update.status.value for update in statuses]
    assert names == sorted(names, key=ORDER.index)
    assert {"QUEUED", "DISPATCHED", "RUNNING"} <= set(names)
    assert names[-1] == "COMPLETED"
    assert len({update.id for update in statuses}) == 1
    assert float(result["answer"]) == 11


def test_printed_lines_arrive_while_the_block_runs(stack: Stack, gpt2: Any) -> None:
    """The block prints and then sleeps for ever: what arrives, arrives while it runs."""
    import time

    async def main() -> list[Any]:
        running = backend(gpt2, AsyncRemoteBackend)
        with gpt2.trace(PROMPT, backend=running):
            print("one")
            print("two", 3)
            time.sleep(FOREVER)
        seen = []
        async for update in running:
            seen.append((update.status.value, update.description))
            if seen[-1] == ("LOG", "two 3"):
                await asyncio.to_thread(cancel, stack, update.id)
        return seen

    seen = asyncio.run(main())
    assert [text for status, text in seen if status == "LOG"] == ["one", "two 3"]
    assert seen[-1][0] == "ERROR"
    assert "ancelled" in seen[-1][1]


def test_a_blocking_client_shows_printed_lines(stack: Stack, gpt2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.APP.REMOTE_LOGGING = True
    with gpt2.trace(PROMPT, remote=True):
        print("seen from inside", gpt2.lm_head.output.shape)
        logits = gpt2.lm_head.output[0, -1].save()
    printed = capsys.readouterr().out
    assert "seen from inside torch.Size([1, " in printed
    assert "COMPLETED" in printed
    assert logits.shape == (512,)


def test_many_clients_each_get_their_own(stack: Stack, gpt2: Any) -> None:
    """All sockets open at once, of two users."""
    keys = [stack.key, key_of(stack, "second")]

    async def main() -> list[Any]:
        sent = [ask(gpt2, n, AsyncRemoteBackend, api_key=keys[n % 2]) for n in range(CLIENTS)]
        return await asyncio.gather(*(running.resolve() for running in sent))

    assert [float(result["answer"]) for result in asyncio.run(main())] == list(range(CLIENTS))


def test_many_blocking_threads_each_get_their_own(stack: Stack) -> None:
    """Each thread with a model of its own: nnsight's models are not made to be traced by two threads."""
    from .support import tiny

    gpt2s = [tiny() for _ in range(4)]
    found: dict[int, torch.Tensor] = {}

    def client(n: int) -> None:
        model = gpt2s[n]
        for turn in range(3):
            with model.trace(PROMPT, remote=True):
                answer = (model.lm_head.output[0, -1].sum() * 0 + 10 * n + turn).save()
            found[10 * n + turn] = answer

    threads = [threading.Thread(target=client, args=(n,)) for n in range(len(gpt2s))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {key: float(value) for key, value in found.items()} == {
        10 * n + t: 10 * n + t for n in range(4) for t in range(3)
    }
