"""Forty requests on their way, twenty whose users wait at a socket and twenty to be asked for later, and the account.

The stock client throughout. Blocks are packed beforehand: nnsight captures one at a time in a process, while any
number of its backends can wait. What it must not know: what is done to the service meanwhile.
"""

# A block's variables are what it saves: ruff cannot know that they are used.
# ruff: noqa: F841

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel
from pydantic import ValidationError
from websocket import WebSocketException

from tests.delivery.scene import PATIENCE, events, get, soon
from tests.stock.support import PROMPT, Keep, backend
from tests.support.stack import Stack

BLOCKING, LATER = 20, 20
LARGE_FLOATS = 40_000
"""160 KB that do not compress: above what this service keeps in Redis."""
EVERY_LARGE = 4
ENDS = ("COMPLETED", "ERROR")
POLL_SECONDS = 0.1
TOLD_SECONDS = 30.0
"""From a request's end until whoever waits at a socket knows, on a machine that is not crowded: milliseconds."""
LEFT = (RemoteError, WebSocketException, httpx.HTTPError, ValidationError, OSError)
"""How the stock client says that its connection broke; a socket that closed is to it an answer that it cannot parse."""


class Packed(RemoteBackend):
    """A stock backend that sends what it was given, and keeps the id that it was answered."""

    blob = b""
    accepted = ""

    def _serialize(self, tracer: Any) -> bytes:
        return self.blob

    def _post(self, request: RequestModel, blob: bytes) -> ResponseModel:
        answer = super()._post(request, blob)
        self.accepted = answer.id
        return answer


@dataclass(frozen=True)
class Block:
    """A packed block, and what it saves when all is well."""

    number: int
    large: bool
    model_key: str
    env: dict[str, Any]
    blob: bytes
    logits: torch.Tensor

    def backend(self, *, blocking: bool) -> Packed:
        made = Packed(self.model_key, env=self.env, blocking=blocking)
        made.blob = self.blob
        return made

    def wrong(self, found: dict[str, Any]) -> str:
        """What is not as it should be; empty when all is."""
        if found["asked"] != self.number:
            return f"block {self.number} was answered what {found['asked']} had asked"
        if not torch.allclose(found["answer"], self.logits, atol=1e-5):
            return f"block {self.number} has other logits than a local run"
        if self.large and not torch.equal(found["drawn"], drawn(self.number)):
            return f"block {self.number} has other numbers than it drew"
        return ""


def drawn(seed: int) -> torch.Tensor:
    return torch.rand(LARGE_FLOATS, generator=torch.Generator().manual_seed(seed))


def packed(model: Any, gate: Path, logits: torch.Tensor, count: int = BLOCKING + LATER) -> list[Block]:
    """Blocks that print their process and wait until the file `gate` is there."""
    return [_pack(model, str(gate), logits, number) for number in range(count)]


def _pack(model: Any, gate: str, logits: torch.Tensor, number: int) -> Block:
    kept, floats, large = backend(model, Keep), LARGE_FLOATS, number % EVERY_LARGE == 0
    if large:
        with model.trace(PROMPT, backend=kept):
            print(os.getpid())
            while not os.path.exists(gate):
                time.sleep(0.02)
            answer = model.lm_head.output[0, -1].clone().save()
            asked = (answer.sum() * 0 + number).save()
            drawn = torch.rand(floats, generator=torch.Generator().manual_seed(number)).save()
    else:
        with model.trace(PROMPT, backend=kept):
            print(os.getpid())
            while not os.path.exists(gate):
                time.sleep(0.02)
            answer = model.lm_head.output[0, -1].clone().save()
            asked = (answer.sum() * 0 + number).save()
    return Block(number, large, kept.model_key, kept.env, kept.blob, logits)


@dataclass
class Sent:
    """One request of a flight: its block, its client, and what came back."""

    block: Block
    client: Packed
    waits: Future[Any] | None = None
    """Of a blocking one: the thread that sits at its socket."""


class Flight:
    """All of `blocks` in flight on one service: the first half blocking, the others to be asked for later.

    Args:
        gate: the file that the blocks wait for.
    """

    def __init__(self, stack: Stack, blocks: Sequence[Block], gate: Path) -> None:
        self.stack = stack
        self.gate = gate
        self.before = set(self.listed())
        self.threads = ThreadPoolExecutor(max_workers=BLOCKING)
        self.sent: list[Sent] = []
        half = len(blocks) // 2
        for block in blocks[:half]:
            client = block.backend(blocking=True)
            request = RequestModel(model_key=client.model_key, compress=client.compress, env=client.env)
            self.sent.append(Sent(block, client, self.threads.submit(client.request, request, None)))
        for block in blocks[half:]:
            client = block.backend(blocking=False)
            client.submit(None)
            self.sent.append(Sent(block, client))
        soon(stack, lambda: all(each.client.accepted for each in self.sent), PATIENCE, "all requests being accepted")

    # -- meanwhile -----------------------------------------------------------------------------------------------------

    def listed(self) -> dict[str, str]:
        """Status of each of the user's requests, by id."""
        return {row["id"]: row["status"] for row in get(self.stack, "/api/requests?limit=500")["requests"]}

    def statuses(self) -> dict[str, str]:
        return {name: status for name, status in self.listed().items() if name not in self.before}

    def at(self, status: str) -> list[Sent]:
        """Those of the flight that are at this status now."""
        found = self.statuses()
        return [each for each in self.sent if found.get(each.client.accepted) == status]

    def when(self, *wanted: str) -> list[Sent]:
        """Wait until something is at each of these statuses, and make sure that all of the flight is under way.

        Returns those at the last one.
        """
        for status in wanted:
            soon(self.stack, lambda status=status: self.at(status), PATIENCE, f"something being {status}")
        open_ = [status for status in self.statuses().values() if status not in ENDS]
        assert len(open_) == len(self.sent), f"only {len(open_)} of {len(self.sent)} requests are in flight"
        assert all(each.waits is None or not each.waits.done() for each in self.sent), "a blocking client has gone"
        return self.at(wanted[-1])

    # -- the end -------------------------------------------------------------------------------------------------------

    def land(self, seconds: float = PATIENCE) -> None:
        """Let everything go on, wait for its end, and hold it to account: see `account`."""
        self.gate.touch()
        deadline = time.monotonic() + seconds
        try:
            while any(status not in ENDS for status in self.settled().values()) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            wrong = self.account()
        finally:
            self.threads.shutdown(wait=False)
            self.gate.unlink(missing_ok=True)
        assert not wrong, "\n".join([*wrong, self.stack.logs()])

    def settled(self) -> dict[str, str]:
        """`statuses`, of a gateway that may be away for a moment."""

        def answered() -> dict[str, str] | None:
            try:
                return self.statuses() or None
            except httpx.HTTPError:
                return None

        found: dict[str, str] = soon(self.stack, answered, PATIENCE, "the gateway answering")
        return found

    def account(self) -> list[str]:
        """Everything that is not as promised, a sentence each."""
        found = self.settled()
        ours = {each.client.accepted for each in self.sent}
        wrong = [f"{name} is there and was never sent" for name in found.keys() - ours]
        return wrong + [
            f"{each.client.accepted}: {what}" for each in self.sent for what in self._account_of(each, found)
        ]

    def _account_of(self, each: Sent, found: dict[str, str]) -> list[str]:
        name = each.client.accepted
        if name not in found:
            return ["it is forgotten"]
        story = [(status, text) for status, text, _ in events(self.stack, name)]
        ends = [status for status, _ in story if status in ENDS]
        if found[name] not in ENDS or ends != ["COMPLETED"]:
            return [f"it is {found[name]} and ended {len(ends)} times: {story}"]
        try:
            values = each.waits.result(TOLD_SECONDS) if each.waits and not self._left(each) else self.again(each)
        except TimeoutError:
            return ["it has ended, and who waits at its socket was not told"]
        return [what for what in [each.block.wrong(values)] if what]

    def _left(self, each: Sent) -> bool:
        """Whether a blocking client's own connection broke: its result is found through the list, as its user would."""
        assert each.waits is not None
        return isinstance(each.waits.exception(TOLD_SECONDS), LEFT)

    def left(self) -> int:
        """How many blocking clients lost their connection."""
        return sum(each.waits is not None and self._left(each) for each in self.sent)

    def again(self, each: Sent) -> dict[str, Any]:
        """The result as somebody reads it who has only the id."""
        client = each.block.backend(blocking=False)
        client.job_id = each.client.accepted
        values: dict[str, Any] = soon(self.stack, client.poll, PATIENCE, f"the result of {client.job_id}")
        return values
