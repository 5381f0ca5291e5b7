"""What a block may do, and that its numbers are those of a local run, at every level."""

# A block's variables are what it saves: ruff cannot know that they are used.
# ruff: noqa: F841

from __future__ import annotations

import asyncio
import os
from typing import Any

import nnsight
import pytest
import torch

from edif_hpc.core.isolation import Isolation
from edif_hpc.core.wire import ResultFormat
from edif_hpc.worker.contract import Verdict
from tests.support import device
from tests.worker.conftest import ADAPTER
from tests.worker.service import PROMPT, Caught, Service, content, loaded

pytestmark = pytest.mark.gpu


def test_a_trace_gives_the_local_numbers(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        hidden = model.transformer.h[1].output[0].save()
        logits = model.lm_head.output.save()
    with model.trace(PROMPT):
        local_hidden = model.transformer.h[1].output[0].save()
        local = model.lm_head.output.save()
    saved = service.saves(caught)
    assert set(saved) == {"hidden", "logits"}
    assert device.equal(saved["logits"], local)
    assert device.equal(saved["hidden"], local_hidden)
    assert not saved["logits"].requires_grad


def test_the_next_request_from_the_same_line_is_another(service: Service, model: Any) -> None:
    for number in (1, 2, 3):
        caught = Caught()
        with model.trace(PROMPT, backend=caught):
            answer = (model.lm_head.output.sum() * 0 + number).save()
        assert service.saves(caught)["answer"] == number


def test_generation_by_steps(service: Service, model: Any, caught: Caught) -> None:
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False, backend=caught) as tracer:
        steps = nnsight.save([])
        for _step in tracer.iter[:3]:
            steps.append(model.lm_head.output[0, -1].argmax())
        ids = tracer.result.save()
    saved = service.saves(caught)
    assert [int(token) for token in saved["steps"]] == saved["ids"][0, -3:].tolist()


def test_a_session_of_several_traces(service: Service, model: Any, caught: Caught) -> None:
    with model.session(backend=caught):
        total = 0
        for prompt in (PROMPT, "another one"):
            with model.trace(prompt):
                norm = model.lm_head.output.norm()
            total = total + norm
        total = nnsight.save(total)
    assert float(service.saves(caught)["total"]) > 0


def test_gradients(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        hidden = model.transformer.h[1].output
        hidden.requires_grad_(True)  # as on NDIF: the service's weights ask for no gradients
        loss = model.lm_head.output.sum()
        with loss.backward():
            gradient = hidden.grad.save()
    gradient = service.saves(caught)["gradient"]
    assert float(gradient.abs().sum()) > 0


def test_a_probe_trained_inside_a_session(service: Service, model: Any, caught: Caught) -> None:
    with model.session(backend=caught):
        probe = torch.nn.Linear(64, 1)
        optimizer = torch.optim.SGD(probe.parameters(), lr=0.01)
        losses = nnsight.save([])
        for _ in range(3):
            with model.trace(PROMPT):
                hidden = model.transformer.h[1].output[0]
            loss = (probe(hidden) - 1).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weight = nnsight.save(probe.weight)
    saved = service.saves(caught)
    assert saved["losses"][-1] < saved["losses"][0]
    assert isinstance(saved["weight"], torch.nn.Parameter)


def test_prints_arrive_in_order_and_while_it_runs(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        import time

        print("one\ntwo")
        print("three", end="")
        print("!")
        time.sleep(0.5)
        print("four", end="")
        out = model.lm_head.output.save()
    lines: list[tuple[str, float]] = []
    clock = service.loop.time
    outcome = service.outcome(caught, on_log=lambda line: lines.append((line, clock())))
    content(outcome)
    assert [line for line, _ in lines] == ["one", "two", "three!", "four"]
    assert lines[3][1] - lines[2][1] > 0.4


def test_endless_prints_are_cut(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        for number in range(1000):
            print(number, "x" * 500)
        out = model.lm_head.output.save()
    lines: list[str] = []
    content(service.outcome(caught, on_log=lines.append, log_lines=10, log_line_bytes=100))
    assert len(lines) == 11
    assert "dropped" in lines[-1]
    assert max(len(line.encode()) for line in lines[:10]) <= 103


WAYS = {"zstd": (True, False), "plain": (False, False), "planes": (True, True), "planes, payload plain": (False, True)}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_of_sending(service: Service, model: Any, way: str) -> None:
    caught = Caught(*WAYS[way])
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output.save()
        large = torch.arange(3_000_000).sin().save()
    with model.trace(PROMPT):
        local = model.lm_head.output.save()
    saved = service.saves(caught)
    assert device.equal(saved["out"], local)
    assert torch.allclose(saved["large"], torch.arange(3_000_000).sin(), atol=1e-6)


def test_planes_are_smaller_and_need_less_memory(service: Service, model: Any) -> None:
    """Since they are made while torch writes. 100 MB are saved."""
    sizes, peaks = {}, {}
    for way in ("zstd", "planes"):
        caught = Caught(*WAYS[way])
        with model.trace(PROMPT, backend=caught):
            out = model.lm_head.output[0, -1]
            many = torch.empty(50_000_000, dtype=torch.bfloat16).normal_().save()
        outcome = service.outcome(caught)
        sizes[way], peaks[way] = len(content(outcome)), outcome.meta["max_memory_usage"]
    assert sizes["planes"] < 0.97 * sizes["zstd"]
    if device.on_cpu() and service.level is not Isolation.NONE:
        assert peaks["planes"] < peaks["zstd"] - 50_000_000


@pytest.mark.parametrize("way", ["zstd", "plain", "planes"])
def test_a_view_leaves_its_storage_behind(service: Service, model: Any, way: str) -> None:
    caught = Caught(*WAYS[way])
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output
        big = torch.zeros(1000, 1000)
        row = big[5].save()
        same = big[5].save()
        half = torch.rand(50_000).bfloat16().save()
        whole = half.view(500, 100).save()
        several = nnsight.save([half, {"again": half.T}, big[5:7, ::2], half[:0]])
    data = content(service.outcome(caught))
    assert len(data) < 150_000
    saved = service.saves(caught)
    assert saved["row"].untyped_storage().nbytes() == 4000
    assert saved["half"].dtype is torch.bfloat16
    again, nested, strided, nothing = saved["several"]
    for alias in (saved["whole"], again, nested["again"]):
        assert alias.dtype is torch.bfloat16
        assert alias.data_ptr() == saved["half"].data_ptr()
    assert saved["row"].data_ptr() == saved["same"].data_ptr()
    assert strided.untyped_storage().nbytes() == 2 * 500 * 4
    assert nothing.untyped_storage().nbytes() == 0


def test_what_a_run_cost(service: Service, model: Any, caught: Caught) -> None:
    with model.trace(PROMPT, backend=caught):
        import time

        time.sleep(0.2)
        out = model.lm_head.output.save()
    outcome = service.outcome(caught)
    content(outcome)
    assert 0.2 <= outcome.meta["runtime"] < 60
    assert outcome.meta["max_memory_usage"] > 1024 * 1024
    on_gpus = set() if device.on_cpu() else {"0"}
    assert set(outcome.meta["max_mem_by_gpu"]) == set(outcome.meta["max_mem_pct_by_gpu"]) == on_gpus


def test_writes_to_weights_stay_in_the_executor(isolated: Service, model: Any) -> None:
    def logits() -> torch.Tensor:
        caught = Caught()
        with model.trace(PROMPT, backend=caught):
            out = model.lm_head.output.save()
        return isolated.saves(caught)["out"]

    before = logits()
    caught = Caught()
    with model.trace(PROMPT, backend=caught):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        out = model.lm_head.output.save()
    assert float(isolated.saves(caught)["out"].abs().sum()) == 0
    if not device.on_cpu():  # there the host notices that its weights have changed, and ends
        isolated.loop.run_until_complete(asyncio.wait_for(isolated.host.died, 60))
        isolated.revive()
    assert device.equal(logits(), before)


def test_the_attention_implementation_changes_between_requests(service: Service, model: Any) -> None:
    seen = []
    for wanted in ("eager", "sdpa", None, "eager"):
        caught = Caught()
        with model.trace(PROMPT, backend=caught):
            kind = nnsight.save([model.config._attn_implementation])
            out = model.lm_head.output.save()
        seen += service.saves(caught, {"attn_implementation": wanted})["kind"]
    assert seen == ["eager", "sdpa", "sdpa", "eager"]


def test_an_adapter_that_is_allowed(service: Service, model: Any) -> None:
    def logits(adapter: str | None) -> torch.Tensor:
        caught = Caught()
        model.load_adapter(str(service.spec.adapters[adapter]) if adapter else None)
        with model.trace(PROMPT, backend=caught):
            out = model.lm_head.output.save()
        return service.saves(caught, {"peft": adapter} if adapter else {})["out"]

    plain = logits(None)
    adapted = logits(ADAPTER)
    assert not device.equal(plain, adapted)
    assert device.equal(logits(ADAPTER), adapted)
    assert device.equal(logits(None), plain)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"peft": "somebody/else"}, "may not be used here"),
        ({"peft": "/etc"}, "may not be used here"),
        ({"peft": ["x"]}, "must be a name"),
        ({"attn_implementation": 3}, "must be a name"),
        ({"attn_implementation": "nonsense"}, "cannot be had here"),
        ({"attn_implementation": "kernels-community/flash"}, "Hub"),
        ({"surprise": 1}, "does not know"),
    ],
)
def test_an_environment_that_cannot_be_had(
    service: Service, model: Any, caught: Caught, env: dict[str, Any], sentence: str
) -> None:
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output.save()
    outcome = service.outcome(caught, env)
    assert outcome.verdict is Verdict.FAILED
    assert sentence in outcome.description
    assert "Traceback" not in outcome.description


def test_random_numbers_differ_between_requests(service: Service, model: Any) -> None:
    drawn = []
    for _ in range(2):
        caught = Caught()
        with model.trace(PROMPT, backend=caught):
            import random

            import numpy

            out = model.lm_head.output
            mine = nnsight.save([torch.rand(1).item(), numpy.random.rand(), random.random()])
        drawn.append(service.saves(caught)["mine"])
    assert not set(drawn[0]) & set(drawn[1])


def test_several_at_once(service: Service, model: Any) -> None:
    blobs = []
    for number in range(6):
        caught = Caught()
        with model.trace(PROMPT, backend=caught):
            answer = (model.lm_head.output.sum() * 0 + number).save()
        blobs.append(caught)

    async def all_of_them() -> list[Any]:
        runs = [service.host.run(service.request(each), each.blob, lambda line: None, lambda: None) for each in blobs]
        return await asyncio.gather(*runs)

    outcomes = service.loop.run_until_complete(all_of_them())
    assert [int(loaded(each, ResultFormat.ZSTD)["answer"]) for each in outcomes] == list(range(6))


def test_a_payload_may_come_as_a_descriptor(service: Service, model: Any, caught: Caught, tmp_path: Any) -> None:
    with model.trace(PROMPT, backend=caught):
        out = model.lm_head.output.save()
    path = tmp_path / "payload"
    path.write_bytes(caught.blob)
    with path.open("rb") as file:
        run = service.host.run(service.request(caught), file.fileno(), lambda line: None, lambda: None)
        outcome = service.loop.run_until_complete(run)
        os.fstat(file.fileno())
    assert outcome.verdict is Verdict.COMPLETED
    content(outcome)


def test_what_a_host_says_of_itself(service: Service) -> None:
    host = service.host
    assert host.level is service.spec.isolation
    assert host.memory_bytes > 50 * 1024 * 1024
    assert host.environment["packages"]["nnsight"] == "0.8.1"
    assert host.pids()["host"] == host.pid
    assert ("zygote" in host.pids()) == (host.level is not Isolation.NONE)
