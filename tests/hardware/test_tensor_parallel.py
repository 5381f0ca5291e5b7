"""Over how many ranks a model can be split, what each then needs, and which devices share one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.core.errors import ModelError, SettingsError
from edif_hpc.hardware.checkpoint import Checkpoint
from edif_hpc.hardware.memory import GIB, MIB, check_fits, required_bytes
from edif_hpc.hardware.tensor_parallel import Split, check_split, join_devices, rank_devices, split_of

pytestmark = pytest.mark.fast

SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}


def checkpoint(split: Split, parameters: int = 1000, **more: Any) -> Checkpoint:
    size = 2 * parameters
    return Checkpoint(
        "org/name", "0" * 40, Path("/x"), "bfloat16", parameters, size, (("BF16", parameters),), split=split, **more
    )


@pytest.mark.parametrize(
    ("config", "degrees"),
    [
        (LLAMA, (2, 4, 8)),
        (SMOLLM2, (3,)),
        ({**LLAMA, "num_key_value_heads": 1}, ()),
        ({**LLAMA, "moe_intermediate_size": 6}, (2,)),
        ({**LLAMA, "intermediate_size": [1024, 1536]}, (2, 4, 8)),
        ({"text_config": LLAMA, "num_attention_heads": 7}, (2, 4, 8)),
        ({"n_head": 12, "n_embd": 768}, ()),
        ({**LLAMA, "num_attention_heads": "32"}, (2, 4, 8)),
        ({"num_attention_heads": True}, ()),
    ],
)
def test_degrees_are_what_divides_heads_and_inner_sizes(config: dict[str, Any], degrees: tuple[int, ...]) -> None:
    assert split_of(config).degrees == degrees


def test_the_sentence_names_the_degrees_that_work() -> None:
    model = checkpoint(split_of(LLAMA))
    for ranks in (1, 2, 4, 8):
        check_split(model, ranks)
    with pytest.raises(ModelError) as caught:
        check_split(model, 3)
    assert str(caught.value) == (
        "The model 'org/name' cannot be split over 3 ranks (models.tensor_parallel): its heads and inner sizes divide "
        "by 2 or 4 or 8; use another model, or ask this service's admin to set models.tensor_parallel to such a "
        "number, or to 1."
    )


def test_what_cannot_be_split_at_all_is_told_so() -> None:
    with pytest.raises(ModelError, match="nor over any other number"):
        check_split(checkpoint(Split()), 2)
    with pytest.raises(ModelError, match=r"it is quantised \(gptq\)"):
        check_split(checkpoint(split_of(LLAMA), quantization="gptq"), 2)
    check_split(checkpoint(Split(), quantization="gptq"), 1)


def test_every_rank_of_a_cpu_counts_and_on_devices_each_has_its_part() -> None:
    model = checkpoint(split_of(LLAMA), 8 * 10**9)
    one, two = required_bytes(model), required_bytes(model, ranks=2)
    assert one + 768 * MIB < two < 1.2 * one + 768 * MIB
    part = required_bytes(model, "auto", "cuda", 4)
    assert 4e9 < part < 16e9 / 4 + 1.6e9 + 1536 * MIB + 1
    whole = replace(model, split=replace(model.split, embedding=10**9))  # each rank holds the embeddings
    assert required_bytes(whole, "auto", "cuda", 4) == pytest.approx(part + 0.75 * 2e9, abs=4)
    check_fits(model, 10 * GIB, "auto", "cuda", 4)
    with pytest.raises(ModelError, match=r"as bfloat16 on each of 4 ranks and .* has 5.0 GiB"):
        check_fits(model, 5 * GIB, "auto", "cuda", 4)


def test_devices_are_joined_in_order_and_what_is_left_over_stays_out() -> None:
    devices = {f"cuda:{number}": 80 - number for number in range(5)}
    assert join_devices(devices, 2) == {"cuda:0+1": 79, "cuda:2+3": 77}
    assert join_devices(devices, 1) == devices
    assert join_devices({"cpu": 9}, 4) == {"cpu": 9}
    assert rank_devices("cuda:2+3", 2) == ["cuda:2", "cuda:3"]
    assert rank_devices("cuda:0", 1) == ["cuda:0"]
    assert rank_devices("cpu", 2) == ["cpu", "cpu"]
    with pytest.raises(SettingsError, match=r"models.tensor_parallel is 8 and a worker here has 5 devices"):
        join_devices(devices, 8)
