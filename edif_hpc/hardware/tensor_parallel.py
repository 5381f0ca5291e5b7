"""Over how many ranks a model can be split, and which devices share one: arithmetic on config.json, without torch.

transformers splits attention by heads and an MLP along its inner dimension, into equal parts, so a degree works when it
divides them all. Whether an architecture has a plan for it only transformers knows: the model host asks that when it
loads. What this module must not know: processes, and how ranks talk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from edif_hpc.core.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from edif_hpc.hardware.checkpoint import Checkpoint

DIVIDED = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""What of a config a degree has to divide. What a config does not name is no constraint."""
JOINT = "+"
"""Between the devices of one place: `cuda:0+1`."""


@dataclass(frozen=True)
class Split:
    """How a model can be split.

    Args:
        largest: the most ranks; every divisor of it works too. 1: it cannot be split.
        embedding: elements of the input embeddings, which each rank holds whole.
    """

    largest: int = 1
    embedding: int = 0

    @property
    def degrees(self) -> tuple[int, ...]:
        """The numbers of ranks above one that work."""
        return tuple(ranks for ranks in range(2, self.largest + 1) if self.largest % ranks == 0)


def split_of(config: Mapping[str, Any]) -> Split:
    """What a config.json, which anybody may have written, says about splitting its model."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    sizes = [size for name in DIVIDED for size in _sizes(text.get(name))]
    wide = [*_sizes(text.get("vocab_size")), *_sizes(text.get("hidden_size"))]
    return Split(gcd(*sizes) if sizes else 1, wide[0] * wide[1] if len(wide) == 2 else 0)


def check_split(checkpoint: Checkpoint, ranks: int) -> None:
    """Refuse a model that cannot be split over so many ranks.

    Raises:
        ModelError: naming the degrees that work.
    """
    if ranks == 1:
        return
    split = checkpoint.split
    wanted = f"The model {checkpoint.repo_id!r} cannot be split over {ranks} ranks (models.tensor_parallel)"
    if checkpoint.quantization is not None:
        raise ModelError(
            f"{wanted}: it is quantised ({checkpoint.quantization}), and only plain weights are split here; ask this "
            "service's admin to serve it with models.tensor_parallel = 1."
        )
    if not split.degrees:
        raise ModelError(
            f"{wanted}, nor over any other number: its heads and inner sizes have no common divisor, or are not named "
            "in its config.json; ask this service's admin to serve it with models.tensor_parallel = 1."
        )
    if ranks not in split.degrees:
        works = " or ".join(map(str, split.degrees))
        raise ModelError(
            f"{wanted}: its heads and inner sizes divide by {works}; use another model, or ask this service's admin to "
            "set models.tensor_parallel to such a number, or to 1."
        )


def join_devices(devices: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The places where a model of so many ranks can live: `cuda:0+1` -> bytes that each of its devices offers.

    A CPU is one place for all ranks, with the bytes that they share.

    Raises:
        SettingsError: there are fewer devices than ranks.
    """
    if ranks == 1 or "cpu" in devices:
        return dict(devices)
    names = list(devices)
    places = {}
    for at in range(0, len(names) - ranks + 1, ranks):
        group = names[at : at + ranks]
        places[_joined(group)] = min(devices[name] for name in group)
    if not places:
        raise SettingsError(
            f"models.tensor_parallel is {ranks} and a worker here has {len(names)} device{'s' * (len(names) != 1)} "
            f"({', '.join(names)}): set it to what an allocation has, or ask for more devices."
        )
    return places


def rank_devices(place: str, ranks: int) -> list[str]:
    """The torch device of each rank at a place that `join_devices` named."""
    kind, _, numbers = place.partition(":")
    return [f"{kind}:{number}" for number in numbers.split(JOINT)] if numbers else [place] * ranks


def _joined(names: list[str]) -> str:
    kind = names[0].partition(":")[0]
    return f"{kind}:{JOINT.join(name.partition(':')[2] for name in names)}"


def _sizes(value: Any) -> Iterator[int]:
    """The sizes that a field names: one, or one per layer."""
    for size in value if isinstance(value, list) else [value]:
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            yield size
