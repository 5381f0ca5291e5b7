"""What a worker asks the queue for: models that have a free place, and sets of models that all have one.

A single model is asked for whether somebody waits for it or not, since a claim costs no more than a look. Of the sets
there are too many to name: only those that somebody was seen to wait for are asked for. They take turns, so that who
asks for much of one kind does not keep the others waiting. Pure: decides, and asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from edif_hpc.core.target import Target

from .residents import Resident

SET_PATIENCE_SECONDS = 30.0
"""How long those who need several models wait for a moment in which all have a place; then such a moment is made."""


def offers(
    ready: Iterable[Resident],
    sets: Mapping[Target, float],
    has_place: Callable[[Resident], bool],
    claimed: Mapping[str, float],
    now: float,
) -> dict[str, tuple[Resident, ...]]:
    """Target -> the models that serve it, in the order in which they are to be asked for.

    Args:
        ready: models that take requests.
        sets: targets of several models or of a pool that somebody waits for, with since when.
        has_place: whether a model may be given one more.
        claimed: when something was last claimed for a target.
    """
    by_key = {str(resident.key): resident for resident in ready}
    found: dict[str, tuple[Resident, ...]] = {}
    kept: set[str] = set()
    for target, since in sets.items():
        keys = [str(key) for key in target.keys]
        if not all(key in by_key for key in keys):
            continue
        if all(has_place(by_key[key]) for key in keys):
            found[str(target)] = tuple(by_key[key] for key in keys)
        elif len(keys) > 1 and now - since > SET_PATIENCE_SECONDS:
            kept.update(keys)  # what becomes free of these waits for the others
    found |= {key: (by_key[key],) for key in by_key.keys() - kept if has_place(by_key[key])}
    return {target: found[target] for target in sorted(found, key=lambda target: (claimed.get(target, 0.0), target))}
