"""What surprises users of remote blocks is said before the block is sent, at the line that does it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import edif_hpc

from .conftest import PROMPT


@pytest.fixture
def report() -> edif_hpc.DryRun:
    """Packs a block, with its warnings, and sends nothing."""
    return edif_hpc.dry_run()


def warned(caught: pytest.WarningsRecorder) -> list[tuple[str, str]]:
    """File and sentence of each."""
    return [(warning.filename, str(warning.message)) for warning in caught]


def test_a_list_made_outside_and_filled_inside(gpt2: Any, report: edif_hpc.DryRun) -> None:
    found: list[Any] = []
    with pytest.warns(edif_hpc.SurpriseWarning, match="'found' is made outside the block") as caught:
        with gpt2.trace(PROMPT, backend=report):
            found.append(gpt2.lm_head.output)
    assert found == []
    assert caught[0].filename == __file__
    assert caught[0].lineno == test_a_list_made_outside_and_filled_inside.__code__.co_firstlineno + 4


def test_a_dict_and_an_attribute(gpt2: Any, report: edif_hpc.DryRun) -> None:
    by_name: dict[str, Any] = {}

    class Holder:
        value: Any = None

    holder = Holder()
    with pytest.warns(edif_hpc.SurpriseWarning) as caught, gpt2.trace(PROMPT, backend=report):
        by_name["a"] = gpt2.lm_head.output
        holder.value = 1
    assert [sentence.partition(" ")[0] for _, sentence in warned(caught)] == ["'by_name'", "'holder'"]


def test_what_is_saved_and_taken_apart_in_one_line(gpt2: Any, report: edif_hpc.DryRun) -> None:
    with pytest.warns(edif_hpc.SurpriseWarning, match="save it under one name") as caught:
        with gpt2.trace(PROMPT, backend=report):
            pair = [gpt2.lm_head.output, gpt2.lm_head.output].save()  # as it should be
            _one, _other = pair.save()
    assert len(caught) == 1
    assert caught[0].lineno == test_what_is_saved_and_taken_apart_in_one_line.__code__.co_firstlineno + 4


class Study:
    """Somebody's own class, which keeps what its blocks find."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.layers: dict[str, list[Any]] = {"first": []}


@pytest.mark.parametrize(
    "fill",
    [
        "study.found.append(gpt2.lm_head.output)",
        "study.layers['first'].append(gpt2.lm_head.output)",
        "study.layers['second'] = gpt2.lm_head.output",
        "nested[0].append(gpt2.lm_head.output)",
        "buffer[0] = gpt2.lm_head.output[0, -1, 0]",
        "array[0] = 1.0",
        "flat += [gpt2.lm_head.output]",
    ],
)
def test_what_is_filled_may_lie_deeper(gpt2: Any, report: edif_hpc.DryRun, fill: str, tmp_path: Path) -> None:
    """Each as a script of its own: a block's text is read from its file."""
    script = tmp_path / "script.py"
    script.write_text(f"with gpt2.trace(PROMPT, backend=report):\n    {fill}\n")
    names = {
        "gpt2": gpt2, "report": report, "PROMPT": PROMPT, "study": Study(), "nested": [[]], "flat": [],
        "buffer": torch.zeros(2), "array": numpy.zeros(2),
    }  # fmt: skip
    with pytest.warns(edif_hpc.SurpriseWarning, match="is made outside the block"):
        exec(compile(script.read_text(), str(script), "exec"), names)


def test_code_after_a_with_over_all_steps(gpt2: Any) -> None:
    handle = edif_hpc.submit()
    with pytest.warns(edif_hpc.SurpriseWarning, match="This line never runs"):
        with gpt2.generate(PROMPT, max_new_tokens=2, backend=handle) as tracer:
            with tracer.iter[:]:
                hidden = gpt2.lm_head.output[0, -1].save()  # noqa: F841
            after = gpt2.lm_head.weight.sum().save()  # noqa: F841
    handle.cancel()


def test_code_after_a_loop_without_an_end(gpt2: Any) -> None:
    handle = edif_hpc.submit()
    with pytest.warns(edif_hpc.SurpriseWarning, match="This line never runs"):
        with gpt2.generate(PROMPT, max_new_tokens=2, backend=handle) as tracer:
            for _ in tracer.iter[:]:
                hidden = gpt2.lm_head.output[0, -1].save()  # noqa: F841
            after = gpt2.lm_head.weight.sum().save()  # noqa: F841
    handle.wait(60)


def test_walking_through_a_cache_that_came_back(gpt2: Any, report: edif_hpc.DryRun) -> None:
    cache: Any = {}
    with pytest.warns(edif_hpc.SurpriseWarning, match="has no model to walk through"):
        with gpt2.trace(PROMPT, backend=report) as tracer:
            cache = tracer.cache().save()
    with pytest.raises(AttributeError):
        cache.transformer.h[0].output


def test_gradients_inside_generate(gpt2: Any, report: edif_hpc.DryRun) -> None:
    with pytest.warns(edif_hpc.SurpriseWarning, match="no gradients inside generate"):
        with gpt2.generate(PROMPT, max_new_tokens=2, backend=report):
            gpt2.lm_head.output.sum().backward()


def test_an_inner_body_on_the_line_of_its_with_is_moved(gpt2: Any, report: edif_hpc.DryRun) -> None:
    handle = edif_hpc.submit()
    for backend in (report, handle):
        with gpt2.session(backend=backend):
            with gpt2.trace(PROMPT): hidden = gpt2.lm_head.output.save()  # noqa: E701, F841  # fmt: skip
    assert report.saved["hidden"].shape == handle.result()["hidden"].shape


def test_a_tracer_left_over_from_before_breaks_nothing(gpt2: Any) -> None:
    """nnsight's own client fails to pack it."""
    with gpt2.trace(PROMPT, remote=True) as tracer:
        first = gpt2.lm_head.output.save()
    handle = edif_hpc.submit()
    with gpt2.session(backend=handle):
        with gpt2.trace() as tracer:
            with tracer.invoke(PROMPT):
                second = gpt2.lm_head.output.save()  # noqa: F841
    assert handle.result()["second"].shape == first.shape


def test_a_tracer_left_over_is_refused_where_it_is_used(gpt2: Any, report: edif_hpc.DryRun) -> None:
    with gpt2.trace(PROMPT, remote=True) as earlier:
        gpt2.lm_head.output.save()
    with pytest.raises(edif_hpc.Misused, match="'earlier' is left from an earlier block"):
        with gpt2.session(backend=report):
            with gpt2.trace():
                with earlier.invoke(PROMPT):
                    second = gpt2.lm_head.output.save()  # noqa: F841


def test_ordinary_blocks_are_left_in_peace(gpt2: Any, report: edif_hpc.DryRun) -> None:
    names, scale = ["a"], {"factor": 2.0}
    blocks = list(gpt2.transformer.h)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gpt2.trace(PROMPT, backend=report) as tracer:
            blocks[0].output[0].add(1)
            blocks[1].output[0][:] = 0
            inside = []
            for layer in blocks[2:]:
                inside.append(layer.output[0] * scale["factor"])
            gpt2.transformer.ln_f.output[:] = 0
            names.append("b")
            names.save()
            count = len(inside).save()  # noqa: F841
            cached = {name: len(name) for name in names}  # noqa: F841
            tracer.stop()


def test_warnings_can_be_silenced(gpt2: Any, report: edif_hpc.DryRun) -> None:
    found: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=edif_hpc.SurpriseWarning)
        with gpt2.trace(PROMPT, backend=report):
            found.append(gpt2.lm_head.output)
