"""Connecting, and requests through their handles: sent, found again, waited for, ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError

import edif_hpc
from tests.support.stack import Stack

from .conftest import PROMPT


def asked(model: Any, number: float) -> edif_hpc.Request:
    handle = edif_hpc.submit()
    with model.trace(PROMPT, backend=handle):
        print("asked for", number)
        answer = (model.lm_head.output[0, -1].sum() * 0 + number).save()  # noqa: F841
    return handle


def sleeping(model: Any, seconds: float) -> edif_hpc.Request:
    handle = edif_hpc.submit()
    with model.trace(PROMPT, backend=handle):
        time.sleep(seconds)
        answer = model.lm_head.output[0, -1].sum().save()  # noqa: F841
    return handle


def test_after_connect_remote_goes_our_way_with_the_stock_clients_numbers(
    gpt2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpt2.trace(PROMPT, remote=True) as tracer:
        print("a line of the block's")
        ours = gpt2.lm_head.output.save()
    assert isinstance(tracer.backend, edif_hpc.Request)
    assert tracer.backend.meta["runtime"] > 0
    assert capsys.readouterr() == ("a line of the block's\n", "")

    with gpt2.trace(PROMPT, backend=RemoteBackend(gpt2.to_model_key(), env=gpt2._remoteable_get_env())):
        stock = gpt2.lm_head.output.save()
    assert torch.equal(ours, stock)


def test_what_is_not_ours_stays_nnsights(stack: Stack, gpt2: Any) -> None:
    with gpt2.trace(PROMPT, remote=stack.url) as tracer:
        found = gpt2.lm_head.output.save()
    assert type(tracer.backend) is RemoteBackend
    assert found.shape[-1] == 512
    with gpt2.trace(PROMPT, remote=True, blocking=False) as tracer:
        found = gpt2.lm_head.output.save()
    assert type(tracer.backend) is RemoteBackend
    edif_hpc.disconnect()
    with gpt2.trace(PROMPT, remote=True) as tracer:
        found = gpt2.lm_head.output.save()
    assert type(tracer.backend) is RemoteBackend
    edif_hpc.connect(stack.url, stack.key, stock=True)
    with gpt2.trace(PROMPT, remote=True) as tracer:
        found = gpt2.lm_head.output.save()
    assert type(tracer.backend) is RemoteBackend


def test_connect_says_what_is_wrong(stack: Stack) -> None:
    with pytest.raises(edif_hpc.Refused, match="unknown here or was revoked") as refused:
        edif_hpc.connect(stack.url, "edif_wrong")
    assert (refused.value.code, refused.value.http_status) == ("key_required", 401)
    with pytest.raises(edif_hpc.NotConnected, match="starts with http"):
        edif_hpc.connect("ftp://somewhere", "edif_key")


def test_on_the_services_own_machine_nothing_need_be_said(stack: Stack) -> None:
    """Neither address nor key; as whom the service runs, who alone may look into its home."""
    identity: dict[str, Any] = {"user": stack.uid, "group": stack.uid, "extra_groups": []} if stack.uid else {}
    script = "import edif_hpc; edif_hpc.requests(); print(edif_hpc.client._connection.current())"
    done = subprocess.run(
        [sys.executable, "-c", script], env=stack.environment(EDIF_HPC_HOME=str(stack.home)), cwd="/",
        capture_output=True, text=True, timeout=60, **identity,
    )  # fmt: skip
    assert done.stdout == f"<edif_hpc connection to {stack.url}>\n", done.stderr


def test_a_handle(gpt2: Any) -> None:
    handle = asked(gpt2, 7)
    assert handle.wait(60) == "COMPLETED"
    assert handle.status == "COMPLETED"
    assert float(handle.result()["answer"]) == 7
    assert handle.result() is handle.result()
    assert handle.logs() == ["asked for 7"]
    assert handle.record()["model"] == "edif-test/gpt2"
    again = edif_hpc.get(handle.id)
    assert again.logs() == ["asked for 7"]
    assert float(again.result()["answer"]) == 7
    assert [request.id for request in edif_hpc.requests(1)] == [handle.id]
    assert handle.cancel() == "done"
    with pytest.raises(edif_hpc.Misused, match="carries request"), gpt2.trace(PROMPT, backend=handle):
        answer = gpt2.lm_head.output.save()  # noqa: F841
    with pytest.raises(edif_hpc.Misused, match="was not sent yet"):
        edif_hpc.submit().result()


def test_sessions_and_generate(gpt2: Any) -> None:
    over_two, tokens = edif_hpc.submit(), edif_hpc.submit()
    with gpt2.session(backend=over_two):
        with gpt2.trace(PROMPT):
            hidden = gpt2.transformer.h[0].output
        with gpt2.trace(PROMPT):
            doubled = (hidden * 2).save()  # noqa: F841
    with gpt2.generate(PROMPT, max_new_tokens=3, backend=tokens) as tracer:
        ids = tracer.result.save()  # noqa: F841
    assert over_two.result()["doubled"].shape[-1] == 64
    assert tokens.result()["ids"].shape == (1, 12)


def test_found_again_in_another_process(stack: Stack, gpt2: Any, child: Callable[..., Any]) -> None:
    handle = asked(gpt2, 11)
    handle.wait(60)
    script = f"""
import edif_hpc
handle = edif_hpc.get({handle.id!r})
print(handle.logs(), float(handle.result()["answer"]), handle.wait())
"""
    with child(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.communicate(timeout=60)[0] == "['asked for 11'] 11.0 COMPLETED\n"


def test_an_error_is_the_users_own_traceback(gpt2: Any) -> None:
    with pytest.raises(edif_hpc.RequestFailed, match="ZeroDivisionError") as failed, gpt2.trace(PROMPT, remote=True):
        answer = 1 / 0  # noqa: F841
    assert isinstance(failed.value, RemoteError)
    assert "answer = 1 / 0" in str(failed.value)
    assert failed.value.meta["runtime"] >= 0
    assert edif_hpc.get(failed.value.request_id).wait() == "ERROR"


def test_cancelling_and_waiting_for_a_while(gpt2: Any) -> None:
    handle = sleeping(gpt2, 100)
    with pytest.raises(edif_hpc.NotFinished, match=r"did not end within 0\.1 s; it goes on"):
        handle.result(timeout=0.1)
    assert handle.cancel() in ("told", "ended")
    assert handle.wait(60) == "ERROR"
    with pytest.raises(edif_hpc.RequestFailed, match="Cancelled"):
        handle.result()


def test_a_strangers_id_is_refused(stack: Stack) -> None:
    with pytest.raises(edif_hpc.Refused, match="no such request of yours"):
        edif_hpc.get("0" * 32)
    with pytest.raises(edif_hpc.Refused, match="is no request's id"):
        edif_hpc.get("../../etc")


def test_types_are_loaded_as_far_as_they_are_harmless(gpt2: Any) -> None:
    """A model's whole output with its keys and values, a cache, numpy and containers are; other classes on demand."""
    handle = edif_hpc.submit()
    with gpt2.trace(PROMPT, backend=handle) as tracer:
        import numpy

        cached = tracer.cache()  # noqa: F841
        output = gpt2.output.save()  # noqa: F841
        array = numpy.arange(3).save()  # noqa: F841
        mixed = {"a": [1, 2.5, None, "x"], "b": {1, 2}, "c": torch.bfloat16, "d": torch.Size([1])}.save()  # noqa: F841
    found = handle.result()
    assert found["output"].logits.shape[-1] == 512
    assert found["cached"]["model.transformer.h.0"].output.shape[-1] == 64
    assert found["array"].tolist() == [0, 1, 2]
    assert found["mixed"] == {"a": [1, 2.5, None, "x"], "b": {1, 2}, "c": torch.bfloat16, "d": torch.Size([1])}

    handle = edif_hpc.submit()
    with gpt2.trace(PROMPT, backend=handle):
        import argparse

        odd = argparse.Namespace(number=gpt2.lm_head.output.sum() * 0).save()  # noqa: F841
    with pytest.raises(edif_hpc.UntrustedResult, match=r"names argparse\.Namespace"):
        handle.result()
    assert float(handle.result(trust=True)["odd"].number) == 0


def test_a_batch_is_bounded_and_keeps_order_and_errors(gpt2: Any) -> None:
    most = 0
    with edif_hpc.batch(at_once=3) as batch:
        for number in range(9):
            with gpt2.trace(PROMPT, backend=batch.submit()):
                if number == 4:
                    raise ValueError(number)
                time.sleep(0.05)
                answer = (gpt2.lm_head.output[0, -1].sum() * 0 + number).save()  # noqa: F841
            open_now = sum(request.record()["status"] not in ("COMPLETED", "ERROR") for request in batch.requests)
            most = max(most, open_now)
    results = batch.results()
    assert most <= 3
    assert isinstance(results[4], edif_hpc.RequestFailed)
    assert [float(found["answer"]) for found in results if isinstance(found, dict)] == [0, 1, 2, 3, 5, 6, 7, 8]
