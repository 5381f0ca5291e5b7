"""Device maps on meta: every budget kept, tied weights together, and a refusal with figures; then a model on the CPU
that was loaded by such a map, and one that runs through accelerate's hooks. No GPU is needed, and none was used.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from edif_hpc.core.errors import HostError
from edif_hpc.core.isolation import Isolation
from edif_hpc.worker import model as models
from edif_hpc.worker import placement
from edif_hpc.worker.host_client import ModelHost
from edif_hpc.worker.placement import bytes_by_device, check_ties, device_of, place, split_ties
from tests.support import device
from tests.support.models import repo_id
from tests.worker.conftest import spec_of

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(n_embd=512, n_head=8, vocab_size=50257),
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=False),
    # As the small ones of Llama 3.2: a vocabulary that weighs as much as several layers, and one weight for both ends.
    "llama-tied": lambda: LlamaConfig(**WIDE, num_key_value_heads=2, vocab_size=64128, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**WIDE, num_key_value_heads=1, head_dim=64, vocab_size=128000),
    "gemma3": lambda: Gemma3TextConfig(**WIDE, num_key_value_heads=1, head_dim=64, vocab_size=128000),
}
TIED = {"gpt2", "llama-tied", "gemma", "gemma3"}


def shape(name: str) -> Any:
    return meta(SHAPES[name]())


def meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def weights(module: Any) -> int:
    return sum(bytes_by_device(module, {"": 0}).values())


def even(module: Any, devices: int, room: float = 1.25) -> dict[str, int]:
    """Budgets that are `room` times the weights together, the first with the embeddings' besides."""
    ends = module.get_input_embeddings().weight.nbytes
    each = int((weights(module) - ends) * room / devices)
    return {f"cuda:{index}": each + (ends * 5 // 4 if index == 0 else 0) for index in range(devices)}


@pytest.mark.fast
@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_every_budget_is_kept_and_tied_weights_stay_together(name: str, devices: int) -> None:
    module = shape(name)
    budgets = even(module, devices)
    found = place(module, budgets, name)
    used = bytes_by_device(module, found)
    assert len(used) > 1  # however few layers are left for the last, when the first holds a large vocabulary
    assert all(size <= budgets[device] for device, size in used.items())
    assert sum(used.values()) == weights(module)
    ends = {module.get_input_embeddings().weight, module.get_output_embeddings().weight}
    assert (len(ends) == 1) is (name in TIED)
    assert split_ties(module, found) == []
    assert device_of(name_of(module, module.get_input_embeddings()), found) == "cuda:0"
    if name in TIED:
        assert device_of("lm_head.weight", found) == "cuda:0"


def name_of(module: Any, part: Any) -> str:
    return next(f"{path}.weight" for path, each in module.named_modules() if each is part)


@pytest.mark.fast
@pytest.mark.parametrize("name", SHAPES)
def test_no_layer_is_cut(name: str) -> None:
    module = shape(name)
    found = place(module, even(module, 3), name)
    layers = [path for path, part in module.named_modules() if type(part).__name__ in module._no_split_modules]
    assert len(layers) == 12
    for path in layers:
        held = {device_of(f"{path}.{tensor}", found) for tensor in module.get_submodule(path).state_dict()}
        assert len(held) == 1


@pytest.mark.fast
def test_layers_lie_in_their_order() -> None:
    module = shape("llama")
    found = place(module, even(module, 4), "llama")
    order = [device_of(f"model.layers.{index}", found) for index in range(12)]
    assert [device for device, _ in itertools.groupby(order)] == sorted(set(order))


@pytest.mark.fast
@pytest.mark.parametrize("name", SHAPES)
def test_what_does_not_fit_is_refused_with_figures(name: str) -> None:
    module = shape(name)
    half = weights(module) // 2 - 1
    with pytest.raises(HostError) as refused:
        place(module, {"cuda:0": half, "cuda:1": half}, "org/model")
    assert f"{weights(module) / 2**30:.2f} GiB of weights" in str(refused.value)
    assert f"cuda:0 with room for {half / 2**30:.2f} GiB and cuda:1" in str(refused.value)


@pytest.mark.fast
def test_a_tied_weight_that_no_device_holds_is_refused_although_the_sum_would_do() -> None:
    module = shape("gemma")
    ends = module.get_input_embeddings().weight.nbytes
    budget = ends * 3 // 4
    assert 4 * budget > weights(module)
    with pytest.raises(HostError, match="tied weights stay together"):
        place(module, {f"cuda:{index}": budget for index in range(4)}, "org/model")


@pytest.mark.fast
def test_the_room_that_accelerate_keeps_on_the_first_device_is_used() -> None:
    """Nearly full devices: accelerate alone would put a layer on disk."""
    module = shape("llama")
    layer = sum(tensor.nbytes for tensor in module.model.layers[0].parameters())
    each = weights(module) // 2 + layer // 2 + layer // 8
    budgets = {"cuda:0": each, "cuda:1": each}
    used = bytes_by_device(module, place(module, budgets, "llama"))
    assert all(size <= budgets[device] for device, size in used.items())


@pytest.mark.fast
def test_ties_that_a_map_splits_are_found() -> None:
    module = shape("gpt2")
    assert split_ties(module, {"transformer": 0, "lm_head": 1}) == [["lm_head.weight", "transformer.wte.weight"]]
    assert split_ties(module, {"": 0}) == []
    with pytest.raises(KeyError):
        split_ties(module, {"transformer": 0})


@pytest.mark.fast
def test_a_model_whose_ties_came_apart_is_not_served() -> None:
    loaded = shape("gpt2")
    check_ties(shape("gpt2"), loaded)
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.clone())
    with pytest.raises(HostError, match="are one weight and were loaded as two"):
        check_ties(shape("gpt2"), loaded)


# -- on the CPU: a map becomes a model --------------------------------------------------------------------------------

CPU = torch.device("cpu")
"""Not the name: that is where accelerate puts what no device has room for."""


@pytest.fixture(scope="module")
def spread(whole: Any, hub: Path) -> Any:
    """The tiny GPT-2 spread over two devices that are both the CPU: with all hooks, which move nothing."""
    from accelerate import dispatch_model
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(repo_id("gpt2")).requires_grad_(False).eval()
    found = place(meta(loaded.config), dict.fromkeys(("cuda:0", "cuda:1"), weights(loaded) * 3 // 4), "gpt2")
    assert set(found.values()) == {"cuda:0", "cuda:1"}
    dispatch_model(loaded, dict.fromkeys(found, CPU), main_device=CPU, force_hooks=True)
    return TransformersModel(loaded, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(repo_id("gpt2")))


@pytest.fixture(scope="module")
def whole(model: Any, hub: Path, adapter: Path) -> Any:
    return models.load(spec_of(model, hub, adapter, Isolation.NONE, device="cpu"), weights=True)


def test_a_spread_model_is_moved_by_hooks_and_its_ties_hold(spread: Any, whole: Any) -> None:
    blocks = spread._module.transformer.h
    assert all(hasattr(block, "_hf_hook") for block in blocks)
    assert not any(hasattr(block, "_hf_hook") for block in whole._module.transformer.h)
    check_ties(meta(spread._module.config), spread._module)
    assert spread._module.lm_head.weight is spread._module.transformer.wte.weight


def logits(loaded: Any) -> torch.Tensor:
    with loaded.trace("The Eiffel Tower is located in"):
        hidden = loaded.transformer.h[2].output
        first = hidden[0] if isinstance(hidden, tuple) else hidden
        first[:] = first * 1.5
        found = loaded.lm_head.output.save()
    return found  # noqa: RET504 - a save is read after the block


def gradient(loaded: Any) -> torch.Tensor:
    with loaded.trace("The Eiffel Tower is located in"):
        hidden = loaded.transformer.h[1].mlp.output
        hidden.requires_grad_(True)
        with loaded.lm_head.output.sum().backward():
            found = hidden.grad.save()
    return found


def generated(loaded: Any) -> torch.Tensor:
    with loaded.generate("The Eiffel Tower is", max_new_tokens=4, do_sample=False) as tracer:
        found = tracer.result.save()
    return found  # noqa: RET504 - a save is read after the block


def inside(loaded: Any) -> torch.Tensor:
    with loaded.trace("The Eiffel Tower is located in"):
        found = loaded.transformer.h[3].mlp.source.self_act_0.output.save()
    return found  # noqa: RET504 - a save is read after the block


@pytest.mark.parametrize("program", [logits, gradient, generated, inside], ids=lambda program: program.__name__)
def test_experiments_see_the_same_numbers(program: Callable[[Any], torch.Tensor], spread: Any, whole: Any) -> None:
    assert torch.equal(program(spread), program(whole))


def test_a_model_is_loaded_by_its_map(
    model: Any, hub: Path, adapter: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the loader of the model host; a second device with room for nothing makes one map of the first."""
    maps: list[dict[str, str]] = []

    def placed(*arguments: Any) -> dict[str, str]:
        maps.append(place(*arguments))
        return maps[-1]

    monkeypatch.setattr(placement, "place", placed)
    spec = spec_of(model, hub, adapter, Isolation.NONE, device="cpu", spread={"cpu": 10**9, "cpu:0": 0})
    loaded = models.load(spec, weights=True)
    (found,) = maps
    assert set(found.values()) == {"cpu"}
    assert all(device_of(name, found) == "cpu" for name in loaded._module.state_dict())
    assert torch.equal(logits(loaded), logits(whole))


def test_a_host_says_that_a_model_does_not_fit_before_it_loads(model: Any, hub: Path, adapter: Path) -> None:
    room = {"cuda:0": 1000, "cuda:1": 1000}
    spec = spec_of(model, hub, adapter, Isolation.NONE, device="cuda:0", spread=room)
    with pytest.raises(HostError, match=r"cannot be spread over cuda:0 with room for 0\.00 GiB"):
        asyncio.run(ModelHost.start(spec, lambda step: None))


@pytest.mark.parametrize("level", [Isolation.PROCESS, Isolation.LOCKED], ids=str)
def test_where_executors_share_the_weights_nothing_is_spread(
    model: Any, hub: Path, adapter: Path, level: Isolation
) -> None:
    spec = spec_of(
        model, hub, adapter, level, required=Isolation.NONE, device="cuda:0", spread={"cuda:0": 1, "cuda:1": 1}
    )
    with pytest.raises(HostError, match="served at isolation none alone"):
        asyncio.run(ModelHost.start(spec, lambda step: None))


@pytest.mark.skipif(
    device.on_cpu() or torch.cuda.device_count() < 2, reason="needs two GPUs and --device cuda; never run so far"
)
@pytest.mark.parametrize("program", [logits, gradient, generated, inside], ids=lambda program: program.__name__)
def test_over_two_gpus_the_numbers_are_those_of_the_cpu(
    program: Callable[[Any], torch.Tensor], model: Any, hub: Path, adapter: Path, whole: Any
) -> None:
    room = dict.fromkeys(("cuda:0", "cuda:1"), weights(whole._module) * 3 // 4)
    loaded = models.load(spec_of(model, hub, adapter, Isolation.NONE, spread=room), weights=True)
    assert {str(tensor.device) for tensor in loaded._module.parameters()} == set(room)
    assert device.equal(program(loaded), program(whole))
