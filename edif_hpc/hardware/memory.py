"""How much memory a model needs to be served, before anything is loaded: pure arithmetic on file headers.

An estimate errs upwards: a refusal names both figures, while a model host that dies of memory takes requests with it.
What this module must not know: how much is free (`detect` says that), and which of several models gives way.
"""

from __future__ import annotations

from collections.abc import Mapping

from edif_hpc.core.errors import ModelError, SettingsError
from edif_hpc.hardware.checkpoint import Checkpoint
from edif_hpc.hardware.profiles import PROFILES

MIB = 1024**2
GIB = 1024**3

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "C64": 64,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits per element of what safetensors can store."""

HELD = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}
"""Bits per element of the dtypes a model can be held in."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Only these follow the dtype asked for; integers and eight-bit floats stay as they are stored."""

ACTIVATION_SHARE = 0.10
"""Of the weights: one prompt's activations and key-value cache. Longer ones meet the request's own memory limit."""
SPREAD_SLACK = 1.1
"""How much more room than its weights a model should find on devices that it is spread over: layers stay whole, so none
of the devices is filled to its last byte."""


def weight_bytes(checkpoint: Checkpoint, dtype: str = "auto") -> int:
    """The weights in memory, in bytes, when held as `dtype` ("auto": the checkpoint's own).

    Raises:
        SettingsError: `dtype` is not one a model can be held in.
    """
    if checkpoint.quantization is not None:
        return checkpoint.stored_bytes  # packed; the quantiser, not the dtype, decides what is unpacked
    held = HELD.get(checkpoint.dtype if dtype == "auto" else dtype)
    if held is None and dtype != "auto":
        raise SettingsError(f"dtype {dtype!r} is unknown; use auto, {', '.join(sorted(HELD))}.")
    bits = 0
    for stored, count in checkpoint.counts:
        own = BITS.get(stored, 64)
        bits += count * (held if held is not None and stored in FLOATING else own)
    return -(-bits // 8)


def required_bytes(checkpoint: Checkpoint, dtype: str = "auto", accelerator: str = "cpu", ranks: int = 1) -> int:
    """What has to be free to serve this model, in bytes, weights included.

    Split over several ranks: on a CPU what all of them need together, else what each needs on its device.
    """
    weights = weight_bytes(checkpoint, dtype)
    beside = int(weights * ACTIVATION_SHARE) + PROFILES[accelerator].runtime_bytes
    if ranks == 1:
        return weights + beside
    whole = weights * checkpoint.split.embedding // max(1, checkpoint.parameters)
    each = whole + -(-(weights - whole) // ranks) + beside
    return each * ranks if accelerator == "cpu" else each


def weight_room(available: int, accelerator: str) -> int:
    """Of `available` bytes on one device, those that weights may take; the rest is for what goes with them."""
    return max(0, int((available - PROFILES[accelerator].runtime_bytes) / (1 + ACTIVATION_SHARE)))


def spread_over(weights: int, budgets: Mapping[str, int], accelerator: str) -> tuple[str, ...]:
    """The devices over which a model is to be laid that none of them has room for: the fewest that will do.

    Args:
        weights: the size of its weights, in bytes.
        budgets: device -> bytes that models may take there.

    Returns:
        Devices in the order of `budgets`, two at least; none where all together are too small.
    """
    chosen: list[str] = []
    found = 0
    for device in sorted(budgets, key=lambda each: -budgets[each]):
        chosen.append(device)
        found += weight_room(budgets[device], accelerator)
        if len(chosen) > 1 and found >= weights * SPREAD_SLACK:
            break
    return tuple(device for device in budgets if device in chosen) if len(chosen) > 1 and found >= weights else ()


def fits(checkpoint: Checkpoint, available: int, dtype: str = "auto", accelerator: str = "cpu", ranks: int = 1) -> bool:
    """Whether `available` bytes are enough."""
    return required_bytes(checkpoint, dtype, accelerator, ranks) <= available


def check_fits(
    checkpoint: Checkpoint, largest: int, dtype: str = "auto", accelerator: str = "cpu", ranks: int = 1
) -> None:
    """Refuse a model that even the emptiest worker could not hold.

    Args:
        largest: bytes there; of a model on several accelerators, on each of them.

    Raises:
        ModelError: naming what it needs and what there is.
    """
    needed = required_bytes(checkpoint, dtype, accelerator, ranks)
    if needed <= largest:
        return
    held = checkpoint.dtype if dtype == "auto" else dtype
    split = "" if ranks == 1 else f" on {ranks} ranks" if accelerator == "cpu" else f" on each of {ranks} ranks"
    raise ModelError(
        f"The model {checkpoint.repo_id!r} needs about {gib(needed)} as {held}{split} and the largest worker of this "
        f"service has {gib(largest)}; use a smaller model, or ask its admin for a larger worker or a smaller dtype."
    )


def gib(size: int) -> str:
    """`12.3 GiB`; two digits below one, so that a tiny model is not 0.0."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / GIB:.2f} GiB"
