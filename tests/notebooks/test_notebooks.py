"""The notebooks of the examples: each runs as a person runs it, finds what its text says, and draws its pictures."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import Stack

from . import kernel

BEFORE = """
import warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", PendingDeprecationWarning)  # the kernel's own, when it is shut down
"""
PNG, FIGURE = "image/png", "application/vnd.plotly.v1+json"
PICTURES = {
    "getting_started": 2, "gender_bias": 4, "steering_study": 5, "activation_patching": 4, "comparing_models": 4
}  # fmt: skip
LARGEST = 700_000

# What must hold in the kernel when a notebook has run: the figures that its text names, written by hand.
FACTS = {
    "getting_started": """
        assert model.tokenizer.decode(words[0]) == " Paris"
        assert abs(odds[0] - 0.654) < 1e-3
        assert [lens.words[0][layer][-1][0] for layer in (27, 28, 29)][1:] == [" Paris", " Paris"]
        assert lens.words[0][27][-1][0] != " Paris"
        for layer, chance in ((26, 0.0013), (28, 0.0721), (29, 0.6541)):
            assert abs(lens.followed[0, layer, -1, 0] - chance) < 1e-3, layer
        assert (again.followed == lens.followed).all()
        assert model.tokenizer.decode(found.result()["word"]) == " Tokyo"
    """,
    "gender_bias": """
        for number, chances in ((jobs.index("nurse"), (0.1187, 0.0239)), (len(jobs), (0.0753, 0.0351))):
            assert abs(she[number, -1] - chances[0]) < 1e-3
            assert abs(he[number, -1] - chances[1]) < 1e-3
        assert len(jobs) == 40
        assert int((final > 0).sum()) in (31, 32)  # the sheriff is at 0.01
        assert abs(final.mean() - 0.47) < 0.02
        assert abs(correlation(final, women) - 0.62) < 0.02
        assert {jobs[job] for job in order[:3]} == {"counselor", "librarian", "nurse"}
        assert {jobs[job] for job in order[-3:]} == {"farmer", "guard", "carpenter"}
        assert with_women[:13].max() < 0.3 and with_women[26:].min() > 0.55
        assert with_women[13:25].min() > 0.15 and with_women[13:25].max() < 0.5
        assert follows.argmax() == 26 and abs(follows[26] - 0.84) < 0.02
        assert abs(gap_before - 0.65) < 0.02
        assert gap[: STARTS.index(24) + 1].abs().max() < 0.15
        assert (gap[STARTS.index(25) : len(STARTS)] < -0.4).all()
        assert (gap[-3:] - 0.65).abs().max() < 0.1
        assert abs(without[STARTS.index(20)].std() - 1.1) < 0.1
    """,
    "steering_study": """
        assert monotone[LAYERS.index(23)] == monotone[LAYERS.index(27)] == 6
        assert (mean_effect[:, FACTORS.index(0.25)] > mean_effect[:, FACTORS.index(-0.25)] + 1).all()
        assert mean_effect[LAYERS.index(19), 0] > mean_effect[LAYERS.index(19), 1]  # it turns back
        assert abs(perplexity[0, unsteered] - 26.8) < 1
        assert 3.5 < perplexity[0, 0] / perplexity[0, unsteered] < 5
        assert perplexity[LAYERS.index(27)].max() < 35
        assert (perplexity[LAYERS.index(15), [0, -1]] > 1.8 * perplexity[0, unsteered]).all()
        strongest = random_swing.abs().amax(1)
        assert (swing[1:] > 1.5 * strongest[1:]).all() and (swing[1:] < 3 * strongest[1:]).all()
        assert swing[0] < 1.3 * strongest[0]
        assert (swing > 0).all() and random_swing.min() < 0 < random_swing.max()
        assert [len(texts) for texts in written.texts] == [3] * 4
        assert len({text for texts in written.texts for text in texts}) == 12
    """,
    "activation_patching": """
        assert abs(clean - 2.84) < 0.01 and abs(corrupt + 8.69) < 0.01
        assert abs(by_hand - 0.787) < 5e-3
        for layer, subject, last in ((22, 0.305, 0.229), (23, 0.001, 0.787)):
            assert abs(residual.recovery[0, layer, 3] - subject) < 5e-3
            assert abs(residual.recovery[0, layer, -1] - last) < 5e-3
        assert abs(residual.recovery[0, 29, -1] - 1) < 1e-3
        assert attention.recovery[0, :, 0].argmax() == 23 and abs(attention.recovery[0, 23, 0] - 0.659) < 5e-3
        assert abs(mlp.recovery[0, 28, 0] - 0.158) < 5e-3
        for layer, head, share in ((23, 4, 0.299), (23, 5, 0.234), (29, 1, 0.250), (29, 0, -0.272)):
            assert abs(shares[heads.layers.index(layer), head] - share) < 5e-3
        assert abs(guess.correlation(residual) - 0.633) < 0.01
        assert guess_heads.correlation(heads) > 0.98
    """,
    "comparing_models": """
        assert abs(here - 3.19) < 0.02 and abs(there - 3.38) < 0.03
        assert cosine.shape == error.shape == lens_kl.shape == (30,)
        assert abs(error[0] - 0.11) < 0.02 and abs(error[20] - 0.3) < 0.03 and abs(error[29] - 0.48) < 0.04
        assert lens_kl[:22].max() < 0.4 and 1.2 < lens_kl[22:].max() < 1.8
        answers = {answer.strip(): pair for answer, pair in zip(found["answers"], chances.tolist(), strict=True)}
        for word, before, after in (("Tokyo", 0.70, 0.08), ("umbrella", 0.63, 0.04), ("Paris", 0.654, 0.266)):
            assert abs(answers[word][0] - before) < 0.01 and abs(answers[word][1] - after) < 0.03, word
        assert answers["five"][1] > answers["five"][0] + 0.1
        assert abs(answers["cold"][0] - answers["cold"][1]) < 0.1
        one, other = (found.recovery[0, :, 0] for found in arrivals.values())
        assert abs(one[22] - 0.23) < 0.01 and abs(one[23] - 0.79) < 0.01
        assert abs(other[22] + 0.04) < 0.03 and abs(other[23] - 0.19) < 0.04
        differences = [float(found.clean - found.corrupt) for found in arrivals.values()]
        assert 0.4 < differences[1] / differences[0] < 0.6
    """,
}


def test_there_is_one_for_each() -> None:
    assert {path.stem for path in kernel.FOLDER.glob("*.ipynb")} == set(kernel.NAMES) == FACTS.keys()


@pytest.mark.parametrize("name", kernel.NAMES)
def test_it_runs_and_finds_what_it_says(name: str, served: tuple[Stack, Path], tmp_path: Path) -> None:
    """Pictures come as figures, not drawn: a browser for each would take longer than all else."""
    notebook = kernel.executed(name, *served, tmp_path, before=BEFORE, after=textwrap.dedent(FACTS[name]))
    outputs = [output for cell in kernel.code_cells(notebook) for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert [kernel.is_picture(output, FIGURE) for output in outputs].count(True) == PICTURES[name]
    for output in outputs:
        if kernel.is_picture(output, FIGURE):
            layout = output.data[FIGURE]["layout"]
            assert layout["title"]["text"]
            assert layout["xaxis"]["title"]["text"]
            assert layout["yaxis"].get("title") or layout["yaxis"]["autorange"] == "reversed"  # names, from the top


@pytest.mark.fast
@pytest.mark.parametrize("name", kernel.NAMES)
def test_it_was_kept_with_what_it_says(name: str) -> None:
    notebook = kernel.read(name)
    cells = kernel.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert [kernel.is_picture(output, PNG) for output in outputs].count(True) == PICTURES[name]
    assert (kernel.FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


ELSEWHERE = re.compile(
    r"(?<![\w.~:/])/(home|root|tmp|work|usr|opt|var|mnt)/|https?://|127\.0\.0\.1|localhost|\b[0-9a-f]{32}\b|edif_[\w-]{20}"
)


@pytest.mark.fast
@pytest.mark.parametrize("name", kernel.NAMES)
def test_nothing_in_it_is_of_one_machine(name: str) -> None:
    notebook = kernel.read(name)
    texts = [cell.source for cell in notebook.cells]
    for cell in kernel.code_cells(notebook):
        for output in cell.outputs:
            texts += [
                str(output.get("text", "")),
                *(str(value) for kind, value in output.get("data", {}).items() if kind != PNG),
            ]
            assert not output.get("metadata")
        assert not cell.metadata
    assert not [found for text in texts for found in ELSEWHERE.findall(text)]
    assert ELSEWHERE.search("see /tmp/x")
    assert ELSEWHERE.search("0123456789abcdef" * 2)


def test_a_new_run_leaves_no_trace_of_itself() -> None:
    """What differs from run to run is taken out before a notebook is kept."""
    import nbformat

    from edif_hpc.client._progress import as_html

    from .write import cleaned

    line = nbformat.v4.new_output("display_data", {"text/html": as_html("0af3 COMPLETED after 1.2 s", "end")})
    told = nbformat.v4.new_output("execute_result", {"text/plain": "5"}, execution_count=7, metadata={"at": "now"})
    said = [nbformat.v4.new_output("stream", text=text) for text in ("one\n", "logit_lens: 4 of 9\n", "two\n")]
    cell: Any = nbformat.v4.new_code_cell("2 + 3", outputs=[line, *said, told], execution_count=7, metadata={"t": 1})
    kept = cleaned(nbformat.v4.new_notebook(cells=[cell], metadata={"machine": "here"}))
    printed, shown = kept.cells[0].outputs
    assert printed.text == "one\ntwo\n"
    assert shown.data == {"text/plain": "5"}
    assert "now" not in nbformat.writes(kept)
    assert "machine" not in kept.metadata
    assert kept.cells[0].execution_count == shown.execution_count == 1
