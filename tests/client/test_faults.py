"""What happens between a laptop and a service: restarts, cut lines, silence, Ctrl-C. Nothing is submitted twice."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import edif_hpc
from edif_hpc.core.home import Home
from edif_hpc.fleet import process
from tests.support.proxy import Proxy
from tests.support.servers import eventually
from tests.support.stack import Stack

from .conftest import PROMPT


def known(stack: Stack) -> list[str]:
    """Ids of all requests of this user."""
    return [request.id for request in edif_hpc.requests(500)]


def newest(stack: Stack, before: list[str], *statuses: str) -> str:
    """The request that was not there before, once it is at one of these statuses."""

    def there() -> str | None:
        new = [request for request in edif_hpc.requests(5) if request.id not in before]
        return new[0].id if new and new[0].record()["status"] in statuses else None

    return eventually(there, 60, f"a new request that is {' or '.join(statuses)}")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_gateway_that_goes_is_waited_for(stack: Stack, gpt2: Any, ending: signal.Signals) -> None:
    before = known(stack)
    killed = []

    def kill() -> None:
        newest(stack, before, "RUNNING")
        pid = next(record.pid for record in process.records(Home(stack.home)) if record.name == "gateway")
        os.kill(pid, ending)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    with gpt2.trace(PROMPT, remote=True):
        time.sleep(3)
        answer = gpt2.lm_head.output[0, -1].sum().save()
    killer.join()
    assert killed
    assert answer.ndim == 0
    assert len(known(stack)) == len(before) + 1


def test_a_lost_answer_submits_nothing_twice(stack: Stack, gpt2: Any, proxy: Proxy) -> None:
    before = known(stack)
    edif_hpc.connect(proxy.url, stack.key, check=False)  # connections of its own, the first of which posts
    proxy.cut_after(1, 1)  # the service has the request, and its answer is lost, twice
    with gpt2.trace(PROMPT, remote=True):
        answer = gpt2.lm_head.output[0, -1].sum().save()
    assert answer.ndim == 0
    assert proxy.counters.connections >= 3
    assert len(known(stack)) == len(before) + 1


def test_a_service_that_is_away_for_a_moment_is_waited_for(stack: Stack, gpt2: Any, proxy: Proxy) -> None:
    handle = edif_hpc.submit()
    with proxy.cut_off():
        back = threading.Timer(1.0, lambda: setattr(proxy, "refusing", False))
        back.start()
        with gpt2.trace(PROMPT, backend=handle):
            answer = gpt2.lm_head.output[0, -1].sum().save()  # noqa: F841
    back.join()
    assert set(handle.result()) == {"answer"}


def test_one_that_stays_away_is_named(stack: Stack, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edif_hpc.client._connect.CHECK_PATIENCE_SECONDS", 0.3)
    with proxy.cut_off(), pytest.raises(edif_hpc.Unreachable, match=f"The service at {proxy.url} does not answer"):
        edif_hpc.connect(proxy.url, stack.key)


def test_a_line_gone_silent_is_given_up_for_another(
    stack: Stack, gpt2: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a laptop's sleep: the socket looks open, and nothing ever comes."""
    monkeypatch.setattr("edif_hpc.client._events.POLL_SECONDS", 0.5)
    monkeypatch.setattr("edif_hpc.client._connection.GRACE_SECONDS", 0.5)
    handle = edif_hpc.submit()
    with gpt2.trace(PROMPT, backend=handle):
        time.sleep(1.5)
        answer = gpt2.lm_head.output[0, -1].sum().save()  # noqa: F841
    proxy.silent = True
    awake = threading.Timer(2.0, lambda: setattr(proxy, "silent", False))
    awake.start()
    assert handle.wait(60) == "COMPLETED"
    awake.join()


WAITING = f"""
import time
import edif_hpc
from nnsight.modeling.transformers import TransformersModel

edif_hpc.connect()
model = TransformersModel("edif-test/gpt2", task="text-generation")
with model.trace({PROMPT!r}, remote=True):
    print("the block's own line")
    time.sleep(100)
    answer = model.lm_head.output.save()
"""


def test_ctrl_c_leaves_the_request_and_says_how_to_find_it(stack: Stack, child: Callable[..., Any]) -> None:
    """In a terminal, where the line with the status is seen as well; another process connects without a hub."""
    before = known(stack)
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                shown.extend(data)
        except OSError:  # how a terminal ends
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with child(WAITING, **options) as waiting:
        os.close(theirs)
        request_id = newest(stack, before, "RUNNING")
        eventually(lambda: b"the block's own line" in shown, 30, "the printed line")
        eventually(lambda: b"RUNNING" in shown, 30, "the status")
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) != 0
    reader.join(10)
    os.close(ours)
    assert f"edif_hpc.get('{request_id}') finds it again" in shown.decode().replace("\r\n", " ")
    handle = edif_hpc.get(request_id)
    assert handle.status == "RUNNING"
    handle.cancel()
    assert handle.wait(60) == "ERROR"


def test_a_batch_left_early_says_what_goes_on(gpt2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), edif_hpc.batch(at_once=2) as batch:
        with gpt2.trace(PROMPT, backend=batch.submit()):
            time.sleep(100)
            answer = gpt2.lm_head.output.save()  # noqa: F841
        raise KeyboardInterrupt
    assert f"go on without you; edif_hpc.get(ID) finds one, its .cancel() ends it: {batch.requests[0].id}" in (
        capsys.readouterr().err
    )
    batch.requests[0].cancel()


def test_another_process_waits_quietly_for_a_request(stack: Stack, gpt2: Any, child: Callable[..., Any]) -> None:
    handle = edif_hpc.submit()
    with gpt2.trace(PROMPT, backend=handle):
        time.sleep(1)
        answer = gpt2.lm_head.output[0, -1].sum().save()  # noqa: F841
    script = f"import sys, edif_hpc; print(edif_hpc.get({handle.id!r}).wait(), 'torch' in sys.modules)"
    with child(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as waiting:
        assert waiting.communicate(timeout=60)[0] == "COMPLETED False\n"
