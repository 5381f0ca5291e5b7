"""What nobody meant to be done: odd files, huge pictures, pairs without a difference, results of another kind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import ExtractActivations, LogitLens, Steer
from edif_hpc.toolkit import (
    Activations,
    AttentionPatterns,
    Attribution,
    Patching,
    Probe,
    Steered,
    SteeringVector,
    _figures,
    _pairs,
    load,
    probe,
)
from edif_hpc.toolkit import LogitLens as Lens

pytestmark = pytest.mark.fast


def read(component: str = "residual", layers: int = 2, **record: Any) -> Activations:
    values = torch.arange(4.0 * layers * 3).view(4, layers, 1, 3)
    tokens = [["a"]] * 4
    return Activations(
        values, torch.ones(4, 1, dtype=torch.bool), list(range(layers)), component, tokens, record=record
    )


def patched(positions: list[int], heads: list[int] | None = None) -> dict[str, Any]:
    heads = heads or []
    shape = (1, 2, len(positions), *([len(heads)] if heads else []))
    return {
        "shape": shape,
        "rest": ("head" if heads else "mlp", [0, 1], heads, [["the"] * len(positions)], [positions]),
    }


def exact_of(positions: list[int], heads: list[int] | None = None) -> Patching:
    found = patched(positions, heads)
    one = torch.ones(1)
    return Patching(torch.rand(found["shape"]), torch.rand(found["shape"]), one, -one, one, *found["rest"])


def guess_of(positions: list[int], heads: list[int] | None = None) -> Attribution:
    found = patched(positions, heads)
    return Attribution(torch.rand(found["shape"]), torch.ones(1), -torch.ones(1), *found["rest"])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".json", ".pt"])
def test_files_of_something_else_are_one_sentence(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"junk{suffix}"
    for content in (b"", b"junk", b"\x80\x02junk, as a pickle begins", b"PK\x03\x04 as an archive begins", b"[1, 2]"):
        file.write_bytes(content)
        with pytest.raises(MethodError, match="holds no result of the toolkit") as caught:
            load(file)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(MethodError, match="holds no result of the toolkit"):
        load(tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["KEPT.SAFETENSORS", "KEPT.NPZ", "Kept.Json", "KEPT.PT"])
def test_suffixes_in_capitals(name: str, tmp_path: Path) -> None:
    vector = SteeringVector(torch.rand(2, 4), [0, 3])
    vector.save(tmp_path / name)
    again = load(tmp_path / name)
    assert isinstance(again, SteeringVector)
    assert torch.equal(again.values, vector.values)
    vector.plot(tmp_path / "PICTURE.HTML")
    assert "Plotly.newPlot" in (tmp_path / "PICTURE.HTML").read_text()


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = SteeringVector(torch.rand(2, 4), [0, 3])
    vector.save(tmp_path / "kept.npz")
    before = (tmp_path / "kept.npz").read_bytes()

    def half(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("edif_hpc.toolkit._result.np.savez_compressed", half)
    with pytest.raises(OSError, match="the disk is full"):
        vector.save(tmp_path / "kept.npz")
    assert (tmp_path / "kept.npz").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["kept.npz"]


# -- pictures ----------------------------------------------------------------------------------------------------------


def long_lens(count: int) -> Lens:
    spots = torch.rand(1, 3, count, 1)
    words = [[[["word"]] * count] * 3]
    return Lens(
        spots.long(), spots, words, torch.zeros(1, 3, count, 0), [], torch.ones(1, count, dtype=torch.bool),
        [0, 1, 2], [[f" t{number}" for number in range(count)]],
    )  # fmt: skip


@pytest.mark.parametrize("count", [200, 1000, 20_000])
def test_pictures_of_many_columns_stay_within_what_can_be_drawn(count: int) -> None:
    lens = long_lens(count).plot()
    many = Activations(
        torch.rand(count, 2, 1, 3), torch.ones(count, 1, dtype=torch.bool), [0, 1], "residual", [["x"]] * count
    )
    for figure in (lens, many.plot()):
        assert figure.layout.width <= _figures.WIDEST
        assert figure.layout.height <= _figures.TALLEST
        assert len(figure.layout.xaxis.tickvals) <= _figures.WIDEST / _figures.TICK
        assert figure.data[0].xgap == 0 or count == 200
        assert len(figure.data[0].z[0]) == count  # nothing is left out
    assert lens.data[0].texttemplate is None
    assert lens.data[0].text is not None  # under the mouse
    assert "%{text}" in lens.data[0].hovertemplate


def test_few_columns_have_their_words_and_names() -> None:
    figure = long_lens(9).plot()
    assert figure.data[0].texttemplate == "%{text}"
    assert len(figure.layout.xaxis.ticktext) == 9
    assert figure.layout.xaxis.ticktext[3] == " t3"


def test_a_long_attention_map_names_some_of_its_rows() -> None:
    tokens = [f" t{number}" for number in range(300)]
    maps = AttentionPatterns(torch.rand(1, 1, 1, 300, 300), {}, [0], [0], [tokens])
    figure = maps.plot(layer=0, head=0)
    assert figure.layout.width <= _figures.WIDEST
    assert figure.layout.height <= _figures.TALLEST
    assert 10 < len(figure.layout.yaxis.tickvals) < 100


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (
            RuntimeError("Error 525: plotly.js error\nand more"),
            r"could not draw 'x\.png' \(Error 525: plotly.js error\)",
        ),
        (PermissionError("socketpair"), r"could not draw 'x\.png' \(socketpair\)"),
        (ValueError("no kaleido"), r"needs kaleido and a Chrome"),
        (b"no", r"drew no image for 'x\.png' \(2 bytes\)"),
        (b"\x89PNG, and then it stops", r"drew no image"),
    ],
)
def test_what_befalls_a_browser_is_one_sentence_and_no_file(
    drawn: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_image(figure: Any, **_: Any) -> bytes:
        if isinstance(drawn, Exception):
            raise drawn
        return drawn

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", to_image)
    with pytest.raises(MethodError, match=said) as caught:
        exact_of([0, 1]).plot(tmp_path / "x.png")
    assert "write .html" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_prompts_that_end_alike_keep_a_line_each() -> None:
    prompts = [f"{name} said what everybody in this whole city says about it" for name in ("Ann", "Bob", "Eve")]
    found = Steered([[""] * 2] * 3, torch.rand(3, 2), torch.zeros(0, 0), [0.0, 1.0], prompts)
    figure = found.plot()
    assert [line.name[:2] for line in figure.data] == ["0 ", "1 ", "2 "]
    lens = long_lens(1)
    twice = Lens(
        lens.ids, lens.probabilities, lens.words, torch.rand(1, 3, 1, 2), ["x", "x"], lens.there, [0, 1, 2], [["a"]]
    )
    assert len(twice.plot_followed().data) == 2


def test_a_measure_that_is_not_there() -> None:
    with pytest.raises(MethodError, match="no measure 'x'; there are recovery, difference, kl"):
        exact_of([0, 1]).plot(measure="x")  # type: ignore[arg-type]


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_a_pair_without_a_difference_has_no_recovery() -> None:
    clean, corrupt = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    exact = Patching(
        torch.ones(2, 1, 2), torch.zeros(2, 1, 2), clean, corrupt, torch.zeros(2), "mlp", [0], [], [["a", "b"]] * 2
    )
    guess = Attribution(torch.rand(2, 1, 2), clean, corrupt, "mlp", [0], [], [["a", "b"]] * 2)
    for found in (exact, guess):
        assert found.recovery[0].isfinite().all()
        assert found.recovery[1].isnan().all()
    assert exact.recovery[0, 0].tolist() == [0.5, 0.5]
    assert exact.plot().data[0].z == ([0.5, 0.5],)  # the mean of those that have one
    assert exact.plot(pair=1).data[0].zmax == 1.0
    with pytest.warns(UserWarning, match=r"the same in both runs of 1 of 2 pairs \(1\): their recovery is NaN"):
        _pairs.warn_of_nothing_between(clean, corrupt)


def test_a_correlation_is_of_the_same_sites() -> None:
    exact = exact_of([0, 1])
    assert -1 <= guess_of([0, 1]).correlation(exact) <= 1
    with pytest.raises(MethodError, match="different sites: their positions differ"):
        guess_of([2, 3]).correlation(exact)
    with pytest.raises(MethodError, match="different sites: their heads differ"):
        guess_of([0], [0, 1]).correlation(exact_of([0], [2, 3]))
    with pytest.raises(MethodError, match="comes from activation_patching"):
        guess_of([0, 1]).correlation(guess_of([0, 1]))  # type: ignore[arg-type]
    half = Attribution(torch.rand(2, 1, 2), torch.tensor([1.0, 0.0]), torch.zeros(2), "mlp", [0], [], [["a", "b"]] * 2)
    whole = Patching(
        torch.rand(2, 1, 2), torch.rand(2, 1, 2), half.clean, half.corrupt, torch.zeros(2), "mlp", [0], [],
        [["a", "b"]] * 2,
    )  # fmt: skip
    assert math.isfinite(half.correlation(whole))  # without the pair that has none


# -- numbers that are none ---------------------------------------------------------------------------------------------


def test_true_is_no_token_layer_or_factor() -> None:
    for made, wrong in (
        (LogitLens, {"prompts": "a", "tokens": [True]}),
        (LogitLens, {"prompts": [[True, 1]]}),
        (LogitLens, {"prompts": "a", "top": True}),
        (ExtractActivations, {"prompts": "a", "layers": [True]}),
        (ExtractActivations, {"prompts": "a", "positions": [False]}),
        (Steer, {"prompts": "a", "positive": "b", "negative": "c", "layers": 1, "factors": [True]}),
    ):
        with pytest.raises(MethodError, match="which cannot be used"):
            made.checked(**wrong)


# -- vectors -----------------------------------------------------------------------------------------------------------


def test_the_record_of_a_vector_tells_both_sides() -> None:
    facts = {"model": "gpt2", "method": "extract-activations"}
    one = read(**facts, parameters={"prompts": ["good"]})
    other = read(**facts, parameters={"prompts": ["bad"]})
    record = SteeringVector.between(one, other, normalised=True).only(1).record
    assert record["made_by"] == "SteeringVector.between"
    assert record["positive"]["parameters"] == {"prompts": ["good"]}
    assert record["negative"]["parameters"] == {"prompts": ["bad"]}
    assert (record["normalised"], record["only"], record["model"]) == (True, [1], "gpt2")
    assert not {"method", "parameters"} & record.keys()  # no single call makes it again
    learnt = probe(one, [0, 0, 1, 1], held_out=[False, True, False, True])
    record = SteeringVector.of(learnt).record
    assert record["made_by"] == "SteeringVector.of"
    assert record["probe"]["method"] == "probe"
    assert not {"method", "parameters"} & record.keys()
    called = SteeringVector(
        torch.rand(3, 4), [0, 1, 2], record={"method": "steering-vector", "parameters": {"layers": None}}
    )
    assert called.only(2).record["parameters"]["layers"] == [2]


def test_vectors_that_cannot_be() -> None:
    out = [False, True, False, True]
    learnt = probe(read("mlp"), [0, 0, 1, 1], held_out=out)
    assert learnt.component == "mlp"
    with pytest.raises(MethodError, match="The probe reads 'mlp', and a vector is added to the residual stream"):
        SteeringVector.of(learnt)
    with pytest.raises(MethodError, match="not a SteeringVector's"):
        SteeringVector.of(SteeringVector(torch.rand(1, 2), [0]))  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="between two Activations, and one is a Tensor"):
        SteeringVector.between(read(), torch.rand(2))  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="trained on Activations, not on a Tensor"):
        probe(torch.rand(2, 3), [0, 1])  # type: ignore[arg-type]
    assert isinstance(learnt, Probe)


def test_a_thousand_columns_make_an_image_where_a_browser_is(tmp_path: Path) -> None:
    from choreographer.browsers.chromium import Chromium
    from PIL import Image

    if not Chromium.find_browser(skip_local=True):
        pytest.skip("no browser")
    long_lens(1000).plot(tmp_path / "LENS.PNG")
    with Image.open(tmp_path / "LENS.PNG") as image:
        image.load()
        assert image.width <= _figures.WIDEST * _figures.SCALE
    assert [each.name for each in tmp_path.iterdir()] == ["LENS.PNG"]
