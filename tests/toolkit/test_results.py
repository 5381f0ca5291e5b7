"""Results by themselves: kept and found again, drawn, and probes on made-up activations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.methods import METHODS
from edif_hpc.toolkit import (
    Activations,
    AttentionPatterns,
    Attribution,
    LogitLens,
    Patching,
    Probe,
    Result,
    Steered,
    SteeringVector,
    TopNeurons,
    _figures,
    _inputs,
    load,
    probe,
)
from edif_hpc.toolkit._progress import tracked, way

pytestmark = pytest.mark.fast

TOKENS = [["The", " <b>", "\n"], ["A", " "]]
RECORD = {"method": "logit-lens", "parameters": {"prompts": ["a"]}, "versions": {"torch": "2"}}
THERE = torch.tensor([[True, True, True], [True, True, False]])


def numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def some() -> dict[str, Result]:
    words = [[[["a", "b"]] * 3] * 2] * 2
    made: list[Result] = [
        Activations(numbers(2, 2, 3, 4).bfloat16(), THERE, [0, 3], "residual", TOKENS, record=RECORD),
        LogitLens(
            torch.arange(24).view(2, 2, 3, 2), numbers(2, 2, 3, 2), words, numbers(2, 2, 3, 1), [" x"], THERE, [0, 3],
            TOKENS, record=RECORD,
        ),
        Patching(numbers(1, 2, 3), numbers(1, 2, 3), *numbers(3, 1), "mlp", [0, 3], [], TOKENS[:1], record=RECORD),
        Patching(numbers(1, 2, 3, 4), numbers(1, 2, 3, 4), *numbers(3, 1), "head", [0, 3], [0, 1, 2, 3], TOKENS[:1]),
        Attribution(numbers(1, 2, 3), *numbers(2, 1), "mlp", [0, 3], [], TOKENS[:1], record=RECORD),
        TopNeurons(torch.arange(24).view(2, 2, 3, 2), numbers(2, 2, 3, 2), THERE, [0, 3], TOKENS, record=RECORD),
        AttentionPatterns(
            numbers(2, 1, 2, 3, 3), {"first": numbers(2, 1, 2), "induction": numbers(2, 1, 2) * math.nan}, [4], [0, 7],
            TOKENS,
        ),
        Probe(
            numbers(2, 1, 4).double(), numbers(2, 1).double(), numbers(2), numbers(2), THERE[0], ["no", "yes"], [0, 3],
            "linear", record=RECORD,
        ),
        SteeringVector(numbers(2, 4), [0, 3], record=RECORD),
        Steered([["x", "y"]], numbers(1, 2), numbers(1, 2), [1.0, -1.0], ["The"], record=RECORD),
    ]  # fmt: skip
    return {f"{type(each).__name__}-{number}": each for number, each in enumerate(made)}


@pytest.mark.parametrize("name", some())
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".json", ".pt"])
def test_what_was_kept_is_found_again(name: str, suffix: str, tmp_path: Path) -> None:
    result = some()[name]
    assert result.save(tmp_path / f"kept{suffix}") is result
    again = load(tmp_path / f"kept{suffix}")
    assert type(again) is type(result)
    assert again._plain() == result._plain()
    ours, theirs = result._tensors(), again._tensors()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value.nan_to_num(9.0), theirs[key].to(value.dtype).nan_to_num(9.0)), key
    assert type(result).__name__ in repr(result)


def test_files_that_are_no_results(tmp_path: Path) -> None:
    result = some()["SteeringVector-8"]
    with pytest.raises(MethodError, match=r"end the name in \.safetensors, \.npz, \.json, \.pt"):
        result.save(tmp_path / "kept.csv")
    with pytest.raises(MethodError, match="no kept result"):
        load(tmp_path / "kept.csv")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "away.npz")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "other.safetensors").write_bytes(b"not at all")
    for name in ("other.json", "other.safetensors"):
        with pytest.raises(MethodError, match="holds no result of the toolkit"):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="only works inside"):
        result.save()


def test_what_is_a_table_is_one_in_parquet(tmp_path: Path) -> None:
    """Which results are tables is also known where there is no torch, so that others are refused at submission."""
    from pyarrow import parquet

    made = some()
    tables = {name: result.table() for name, result in made.items()}
    names = {each.replace("-", " ").title().replace(" ", "") for each in METHODS if METHODS[each].is_table}
    renamed = {"ActivationPatching": "Patching", "AttributionPatching": "Attribution", "Steer": "Steered"}
    assert {type(made[name]).__name__ for name, found in tables.items() if found} == {
        renamed.get(name, name) for name in names
    }
    for name, found in tables.items():
        file = tmp_path / f"{name}.parquet"
        if found is None:
            with pytest.raises(MethodError, match=r"end the name in \.safetensors, \.npz, \.json, \.pt, or draw"):
                made[name].save(file)
            continue
        made[name].save(file)
        table = parquet.read_table(file)
        assert table.to_pydict() == found
        assert json.loads(table.schema.metadata[b"edif_hpc"]) == made[name].record


def test_a_table_has_a_row_for_each_place_that_is_there() -> None:
    made = some()
    lens, heads = made["LogitLens-1"].table(), made["Patching-3"].table()
    assert lens
    assert list(zip(lens["prompt"], lens["position"], lens["layer"], strict=True)) == [
        (prompt, position, layer) for prompt, positions in ((0, 3), (1, 2)) for position in range(positions)
        for layer in (0, 3)
    ]  # fmt: skip
    assert lens["token"][::2] == [*TOKENS[0], *TOKENS[1]]
    assert lens["ids"][3] == [8, 9]  # of prompt 0, layer 3, position 1
    assert heads
    assert heads["head"][:5] == [0, 1, 2, 3, 0]
    assert heads["difference"] == numbers(1, 2, 3, 4).flatten().tolist()


def plots(name: str, result: Any, path: Path | None) -> Any:
    return result.plot(path, layer=4, head=7) if name.startswith("AttentionPatterns") else result.plot(path)


@pytest.mark.parametrize("name", some())
def test_every_result_has_a_picture(name: str, tmp_path: Path) -> None:
    result = some()[name]
    figure = plots(name, result, tmp_path / "picture.html")
    assert type(figure).__name__ == "Figure"
    page = (tmp_path / "picture.html").read_text()
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page.lower()  # it holds plotly itself
    assert figure.layout.title.text
    assert figure.layout.xaxis.title.text


def test_more_pictures(tmp_path: Path) -> None:
    made = some()
    assert made["LogitLens-1"].plot_followed().data[0].name == " x"
    assert made["AttentionPatterns-6"].plot_scores("first").data[0].z[0] == pytest.approx([-1 / 3, 1 / 3], abs=1e-6)
    with pytest.raises(MethodError, match="There is no score 'previous'"):
        made["AttentionPatterns-6"].plot_scores("previous")
    with pytest.raises(MethodError, match="There is no map of layer 5, head 7"):
        made["AttentionPatterns-6"].plot(layer=5, head=7)
    for picture, wrong in (
        (made["AttentionPatterns-6"].plot, {"layer": 4, "head": 7, "prompt": 99}),
        (made["LogitLens-1"].plot, {"prompt": 99}),
        (made["LogitLens-1"].plot_followed, {"position": 99}),
        (made["Patching-2"].plot, {"pair": 99}),
    ):
        with pytest.raises(MethodError, match=r"There is no (prompt|position|pair) 99 in this result, which has \d"):
            picture(**wrong)
    assert made["Patching-2"].plot(measure="kl").data[0].zmin == 0
    with pytest.raises(MethodError, match=r"end the name in \.html"):
        made["Patching-2"].plot(tmp_path / "picture.bmp")
    assert _figures.visible(" <b>") == " &lt;b>"
    assert _figures.visible("  ") == "␣␣"


def test_an_image_is_drawn_where_a_browser_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from choreographer.browsers.chromium import Chromium

    result = some()["Patching-2"]
    if Chromium.find_browser(skip_local=True):
        result.plot(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("BROWSER_PATH", "")
    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda cls, skip_local: None))
    with pytest.raises(MethodError, match=r"'other\.png' needs kaleido and a Chrome or Chromium") as caught:
        result.plot(tmp_path / "other.png")
    assert "write .html" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- probes ------------------------------------------------------------------------------------------------------------


def clouds(classes: int, each: int = 40, apart: float = 6.0) -> tuple[Activations, list[int]]:
    """Layer 0 tells nothing apart, layer 1 everything, far from the origin and badly scaled."""
    generator = torch.Generator().manual_seed(0)
    labels = [number for number in range(classes) for _ in range(each)]
    noise = torch.randn(len(labels), 2, 1, 8, generator=generator)
    noise[:, 1, 0, :classes] += apart * torch.nn.functional.one_hot(torch.tensor(labels), classes)
    values = noise * torch.logspace(-2, 2, 8) + 50
    return Activations(
        values, torch.ones(len(labels), 1, dtype=torch.bool), [0, 7], "residual", [["x"]] * len(labels)
    ), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_a_linear_probe_finds_what_is_there(classes: int) -> None:
    found, labels = clouds(classes)
    learnt = probe(found, labels)
    assert learnt.held_out.sum() == classes * 10
    assert learnt.accuracy[1] == 1.0
    assert learnt.accuracy[0] < 0.75
    assert learnt.directions.shape == (2, 1 if classes == 2 else classes, 8)
    assert learnt.predict(found, 7) == labels
    assert torch.equal(learnt.directions, probe(found, labels).directions)
    assert not torch.equal(learnt.held_out, probe(found, labels, seed=1).held_out)


def test_it_is_the_optimum_of_logistic_regression() -> None:
    """At the optimum the gradient is 0: computed by hand, on standardised activations."""
    found, labels = clouds(2, apart=2.0)
    out = [number % 4 == 0 for number in range(80)]
    learnt = probe(found, labels, held_out=out, penalty=0.1)
    kept = ~torch.tensor(out)
    x, y = found.values[kept, 1, 0].double(), torch.tensor(labels)[kept].double()
    center, spread = x.mean(0), x.std(0)
    weights = learnt.directions[1, 0] * spread
    chance = torch.sigmoid((x - center) / spread @ weights + learnt.offsets[1, 0] + learnt.directions[1, 0] @ center)
    gradient = ((x - center) / spread).T @ (chance - y) / len(y) + 0.1 * weights
    assert gradient.abs().max() < 1e-6
    assert (chance - y).mean().abs() < 1e-6


def test_mass_mean_is_the_difference_of_means() -> None:
    found, labels = clouds(2)
    words = ["good" if label else "bad" for label in labels]
    out = [number % 4 == 0 for number in range(80)]
    learnt = probe(found, words, kind="mass_mean", held_out=torch.tensor(out))
    assert learnt.classes == ["bad", "good"]
    x, y, kept = found.values[:, 1, 0].double(), torch.tensor(labels), ~torch.tensor(out)
    torch.testing.assert_close(learnt.directions[1, 0], x[kept & (y == 1)].mean(0) - x[kept & (y == 0)].mean(0))
    vector = SteeringVector.of(learnt)
    torch.testing.assert_close(vector.values.norm(dim=-1), torch.ones(2))


def test_probes_that_cannot_be() -> None:
    found, labels = clouds(2)
    several = Activations(torch.zeros(2, 1, 3, 4), torch.ones(2, 3, dtype=torch.bool), [0], "residual", [["x"]] * 2)
    with pytest.raises(MethodError, match="these have 3 positions"):
        probe(several, [0, 1])
    with pytest.raises(MethodError, match="There are 3 labels for 80 prompts"):
        probe(found, [0, 1, 1])
    with pytest.raises(MethodError, match="A class has 1 prompts, too few to hold 25% out"):
        probe(found, [0] * 79 + [1])
    learnt = probe(found, labels)
    with pytest.raises(MethodError, match=r"There is no probe of layer 3; there are those of \[0, 7\]"):
        learnt.predict(found, 3)
    with pytest.raises(MethodError, match="The activations are 5 wide and the probe 8"):
        learnt.predict(torch.zeros(2, 5), 7)
    with pytest.raises(MethodError, match="has no one direction"):
        SteeringVector.of(probe(*clouds(3)))


def test_labels_may_be_arrays() -> None:
    found, labels = clouds(2)
    wanted = probe(found, labels).directions
    assert torch.equal(probe(found, torch.tensor(labels)).directions, wanted)
    assert torch.equal(probe(found, torch.tensor(labels).numpy()).directions, wanted)


def test_a_vector_between_two_sets() -> None:
    there = torch.tensor([[True, True], [True, False]])
    one = Activations(numbers(2, 1, 2, 4), there, [3], "residual", TOKENS)
    other = Activations(torch.ones(2, 1, 2, 4), there, [3], "residual", TOKENS)
    means = (one.values[0, 0].mean(0) + one.values[1, 0, 0]) / 2
    vector = SteeringVector.between(one, other)
    torch.testing.assert_close(vector.values[0], means - 1)
    torch.testing.assert_close(SteeringVector.between(one, other, normalised=True).values.norm(), torch.tensor(1.0))
    with pytest.raises(MethodError, match="extract them alike"):
        SteeringVector.between(one, Activations(one.values, there, [2], "residual", TOKENS))
    with pytest.raises(MethodError, match=r"There is no vector of layer 2; there are those of \[3\]"):
        vector.only(2)


def test_estimates_are_compared_with_the_same_sites() -> None:
    exact, guess = some()["Patching-2"], some()["Attribution-4"]
    assert isinstance(exact, Patching)
    assert isinstance(guess, Attribution)
    assert -1 <= guess.correlation(exact) <= 1
    with pytest.raises(MethodError, match="The two cover different sites"):
        guess.correlation(some()["Patching-3"])  # type: ignore[arg-type]


# -- batches and progress ----------------------------------------------------------------------------------------------


def test_batches_fit_and_come_back_in_order() -> None:
    ids = [[number] * length for number, length in enumerate([3, 9, 1, 4, 4, 30])]
    parts = _inputs.batches(ids, 12)
    assert sorted(number for part in parts for number in part.which) == list(range(6))
    assert all(part.ids.numel() <= 12 for part in parts if len(part.which) > 1)
    assert [len(part.which) for part in parts if 30 in part.lengths] == [1]
    back = _inputs.in_order([(part, part.ids * part.mask) for part in parts], 1)
    assert [[value for value in row if value] for row in back.tolist()] == [[], *ids[1:]]
    spots = _inputs.batch_spots(_inputs.batch(ids, [1, 2]), "all")
    values = spots.of(torch.arange(18.0).view(2, 9, 1))
    assert spots.reduced(values, "mean").flatten().tolist() == [4.0, 9.0]
    assert spots.reduced(values, "max").flatten().tolist() == [8.0, 9.0]


def test_progress_is_quiet_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (way(None, False), way(None, True), way(False, True)) == ("bar", "lines", "off")
    for how in ("bar", "lines", "off"):
        assert list(tracked([1, 2, 3], "lens", how)) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    with monkeypatch.context() as terminal:
        terminal.setenv("FORCE_COLOR", "1")
        terminal.setenv("TERM", "xterm")
        assert list(tracked([1, 2, 3], "lens", "bar")) == [1, 2, 3]
    assert "lens" in capsys.readouterr().err
    monkeypatch.setattr("edif_hpc.toolkit._progress.LINE_SECONDS", 0.0)
    assert list(tracked([1, 2], "lens", "lines", [10, 5])) == [1, 2]
    assert capsys.readouterr().out == "lens: 10 of 15\n"
