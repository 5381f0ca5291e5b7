"""A block run on shapes alone: what it reports is what a real run saves, and it touches nothing of the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import edif_hpc

from .conftest import PROMPT


def test_it_reports_what_a_real_run_saves(gpt2: Any) -> None:
    report, handle = edif_hpc.dry_run(), edif_hpc.submit()
    for backend in (report, handle):
        with gpt2.trace(backend=backend) as tracer:
            with tracer.invoke(PROMPT):
                hidden = gpt2.transformer.h[1].output[:, -1].save()  # noqa: F841
            with tracer.invoke(PROMPT + " love"):
                chances = gpt2.lm_head.output.softmax(-1).to(torch.bfloat16).save()  # noqa: F841
    found = handle.result()
    assert set(report.saved) == set(found) == {"hidden", "chances"}
    for name, saved in report.saved.items():
        assert saved.shape == tuple(found[name].shape)
        assert f"torch.{saved.dtype}" == str(found[name].dtype)
        assert saved.bytes == found[name].numel() * found[name].element_size()
    assert report.bytes == sum(saved.bytes for saved in report.saved.values())
    assert report.payload_bytes > 100
    assert not gpt2.dispatched
    assert "bfloat16 1 x 13 x 512" in str(report.check())


def test_sessions_and_containers(gpt2: Any) -> None:
    report = edif_hpc.dry_run()
    with gpt2.session(backend=report):
        with gpt2.trace(PROMPT):
            layers = [layer.output[0] for layer in gpt2.transformer.h]
        with gpt2.trace(PROMPT):
            doubled = [layer * 2 for layer in layers].save()  # noqa: F841
    assert report.saved["doubled"].type == "list"
    assert report.bytes == 4 * 9 * 64 * 4
    assert [tensor.shape for tensor in report.saved["doubled"].tensors] == [(9, 64)] * 4
    assert "list: 4 of float32 9 x 64" in repr(report)


def test_the_users_own_mistakes_come_at_once(gpt2: Any, caplog: pytest.LogCaptureFixture) -> None:
    report = edif_hpc.dry_run()
    with pytest.raises(RuntimeError, match="Expected size"), gpt2.trace(PROMPT, backend=report):
        wrong = (gpt2.transformer.h[0].output @ gpt2.transformer.h[1].output).save()  # noqa: F841
    assert caplog.text == ""
    with gpt2.trace(PROMPT, backend=edif_hpc.dry_run()) as tracer:
        tracer.stop()  # the model is free again


def test_what_decides_by_numbers_ends_it(gpt2: Any) -> None:
    report = edif_hpc.dry_run()
    with gpt2.trace(PROMPT, backend=report):
        logits = gpt2.lm_head.output.save()
        if logits.max().item() > 0:
            more = logits.sum().save()  # noqa: F841
    assert set(report.saved) == {"logits"}
    assert "decides by numbers" in report.stopped
    with pytest.raises(edif_hpc.DryRunStopped, match="only a real run can tell"):
        report.check()
    report = edif_hpc.dry_run()
    with gpt2.generate(PROMPT, max_new_tokens=2, backend=report) as tracer:
        ids = tracer.result.save()  # noqa: F841
    assert "decides by numbers" in report.stopped
