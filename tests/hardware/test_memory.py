"""What a model needs to be served, and the sentence for one that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.core.errors import ModelError, SettingsError
from edif_hpc.hardware.checkpoint import Checkpoint
from edif_hpc.hardware.memory import (
    GIB,
    MIB,
    check_fits,
    fits,
    gib,
    required_bytes,
    spread_over,
    weight_bytes,
    weight_room,
)

pytestmark = pytest.mark.fast


def checkpoint(counts: dict[str, int], dtype: str = "bfloat16", **more: object) -> Checkpoint:
    sizes = {"stored_bytes": 7, **more}
    return Checkpoint("org/name", "0" * 40, Path("/x"), dtype, sum(counts.values()), counts=(*counts.items(),), **sizes)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", 2000), ("bfloat16", 2000), ("float16", 2000), ("float32", 4000), ("float64", 8000)]
)
def test_weights_at_the_held_dtype(dtype: str, expected: int) -> None:
    assert weight_bytes(checkpoint({"F32": 600, "BF16": 400}), dtype) == expected


def test_integers_and_small_floats_stay_as_they_are_stored() -> None:
    assert weight_bytes(checkpoint({"BF16": 100, "I64": 10, "F8_E4M3": 3, "F4": 3}), "float32") == 400 + 80 + 3 + 2


def test_auto_with_a_dtype_nobody_knows_counts_what_is_stored() -> None:
    assert weight_bytes(checkpoint({"F8_E4M3": 100, "BF16": 10}, dtype="float8_e4m3fn")) == 120


def test_a_quantised_model_counts_as_stored() -> None:
    assert weight_bytes(checkpoint({"I32": 100}, quantization="gptq", stored_bytes=400), "float32") == 400


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(SettingsError, match="dtype 'int3' is unknown; use auto, bfloat16"):
        weight_bytes(checkpoint({"F32": 1}), "int3")


def test_a_large_model_needs_its_weights_and_a_tenth() -> None:
    seventy = checkpoint({"BF16": 70 * 10**9})
    assert 1.1 * 140e9 < required_bytes(seventy, "auto", "cuda") < 1.15 * 140e9
    assert not fits(seventy, 141 * 10**9, "auto", "cuda")
    assert fits(seventy, 192 * 10**9, "auto", "rocm")


def test_a_tiny_model_still_needs_a_process() -> None:
    assert required_bytes(checkpoint({"F32": 1000}), "auto", "cpu") > 512 * MIB


def test_what_cannot_fit_is_told_with_both_figures() -> None:
    big = checkpoint({"BF16": 8 * 10**9})
    check_fits(big, 100 * GIB)
    with pytest.raises(ModelError) as caught:
        check_fits(big, 16 * GIB, "float32", "cuda")
    assert str(caught.value) == (
        "The model 'org/name' needs about 34.3 GiB as float32 and the largest worker of this service has 16.0 GiB; "
        "use a smaller model, or ask its admin for a larger worker or a smaller dtype."
    )


def test_sizes_read_well() -> None:
    assert (gib(0), gib(300 * MIB), gib(GIB), gib(int(79.64 * GIB))) == ("0.00 GiB", "0.29 GiB", "1.0 GiB", "79.6 GiB")


@pytest.mark.parametrize(
    ("weights", "sizes", "chosen"),
    [
        (40, [80, 80, 80], ["a", "b"]),  # two at least: on one it would not be spread
        (140, [80, 80, 80], ["a", "b", "c"]),  # two have 142 for it, which leaves no slack where there is a third
        (140, [80, 80], ["a", "b"]),
        (100, [40, 80, 80], ["b", "c"]),
        (150, [80, 80], []),
        (40, [80], []),
    ],
)
def test_the_fewest_devices_over_which_a_model_can_be_laid(weights: int, sizes: list[int], chosen: list[str]) -> None:
    budgets = {name: size * GIB for name, size in zip("abc", sizes, strict=False)}
    assert spread_over(weights * GIB, budgets, "cuda") == tuple(chosen)


def test_a_device_has_room_for_less_than_it_holds() -> None:
    assert required_bytes(checkpoint({"BF16": 10**9}), accelerator="cuda") == pytest.approx(
        2 * 10**9 * 1.1 + 1536 * MIB, abs=1
    )
    assert weight_room(int(2 * 10**9 * 1.1) + 1536 * MIB, "cuda") == pytest.approx(2 * 10**9, abs=1)
    assert weight_room(GIB, "cuda") == 0
