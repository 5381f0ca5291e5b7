"""Load one model for tracing, with weights or on meta, from the offline cache; the same way in host and zygote.

Both must build the same module tree, since a request names modules by their path in it.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from edif_hpc.core.errors import HostError
from edif_hpc.core.wire import ModelKey
from edif_hpc.worker.contract import HostSpec

WHOLE = "replicated_with_grad_allreduce"
"""transformers' style for a module that each rank holds whole, and the one of these that nnsight knows."""


def load(spec: HostSpec, *, weights: bool) -> Any:
    """The nnsight model that this key names; `weights` False builds it on meta.

    Raises:
        HostError: one sentence saying what is missing or does not fit.
    """
    key = ModelKey.parse(spec.model_key)  # refuses any class that is not on the allow-list, before any import
    from nnsight.modeling.transformers import TransformersModel

    options: dict[str, Any] = {"dtype": _dtype(spec.dtype)}
    shape = load(spec, weights=False)._module if weights and spec.spread else None
    try:
        if spec.ranks > 1:
            options["distributed_config"] = _split(TransformersModel.from_model_key(spec.model_key, **options), spec)
        elif shape is not None:
            options["device_map"] = _device_map(shape, spec)
        elif weights and spec.device != "cpu":
            options["device"] = spec.device
        model = TransformersModel.from_model_key(spec.model_key, dispatch=weights, **options)
    except torch.OutOfMemoryError as error:
        raise HostError(
            f"{key.repo_id} does not fit into the memory of {', '.join(spec.devices)}: {first_line(error)}"
        ) from error
    except MemoryError as error:
        raise HostError(f"{key.repo_id} does not fit into this machine's memory.") from error
    except OSError as error:
        raise HostError(
            f"{key.repo_id} is not complete in the model cache {spec.cache}, and workers are offline: "
            f"fetch it with `edif-hpc models pull {key.repo_id}` ({first_line(error)})."
        ) from error
    except HostError:
        raise
    except Exception as error:  # whatever transformers raises about a checkpoint becomes a sentence
        raise HostError(f"{key.repo_id} could not be loaded: {type(error).__name__}: {first_line(error)}") from error
    if shape is not None:
        _check_ties(shape, model._module)
    model._module.requires_grad_(False)  # gradients towards activations are 2.3 x faster without those of the weights
    model._module.eval()
    model._module.config._commit_hash = _commit(spec, key)  # where transformers kept it up to 5.14, and records look
    return model


def _commit(spec: HostSpec, key: ModelKey) -> str | None:
    """The commit that was loaded: the name of its snapshot."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(key.repo_id, "config.json", cache_dir=spec.cache, revision=key.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _device_map(shape: Any, spec: HostSpec) -> dict[str, str]:
    """Which module goes to which device, decided on the model's shape alone."""
    from edif_hpc.worker.placement import place  # accelerate's import takes a while, and few models are spread

    return place(shape, spec.spread, ModelKey.parse(spec.model_key).repo_id)


def _check_ties(shape: Any, loaded: Any) -> None:
    from edif_hpc.worker.placement import check_ties

    check_ties(shape, loaded)


def _split(meta: Any, spec: HostSpec) -> Any:
    """transformers' plan for this model, as a DistributedConfig.

    Its own plan cuts the embeddings by vocabulary, and nnsight cannot show such a module's output (its way back is good
    for one use only): they stay whole on each rank. So does an output layer that is tied to them, or has an odd size.

    Raises:
        HostError: it has no plan, or one whose pieces nnsight cannot put together.
    """
    from nnsight.modeling.tp import UnshardableCheckpoint, check_tp_request
    from transformers.distributed.configuration_utils import DistributedConfig

    module = meta._module
    try:
        check_tp_request(module.config, spec.ranks)
    except UnshardableCheckpoint:
        raise HostError(
            f"{meta.repo_id} cannot be split over {spec.ranks} ranks (models.tensor_parallel): transformers has no "
            f"plan for a {type(module).__name__}, or nnsight no way to show its parts whole; serve it with "
            "models.tensor_parallel = 1."
        ) from None
    first, last = module.get_input_embeddings(), module.get_output_embeddings()
    keep = [first]
    if last is not None and (last.weight is first.weight or last.weight.shape[0] % spec.ranks):
        keep.append(last)
    names = [name for name, child in module.named_modules() if any(child is one for one in keep)]
    return DistributedConfig(
        tp_size=spec.ranks, tp_plan={name: WHOLE for name in names if name in module.tp_plan} or None
    )


def settle() -> None:
    """Take everything that exists now out of the garbage collector's sight: it would be scanned on every request."""
    gc.collect()
    gc.freeze()


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _dtype(name: str) -> Any:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise HostError(f"{name!r} is no torch dtype: set the model's dtype to auto, float32, bfloat16 or float16.")
    return dtype
