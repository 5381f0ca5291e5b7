"""Results as tables, for data frames: one row for each place that was looked at, with what was found there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Columns = dict[str, list[Any]]


def by_spot(
    tokens: Sequence[Sequence[str]], layers: Sequence[int], there: torch.Tensor, found: dict[str, Any]
) -> Columns:
    """One row a prompt, position that it has, and layer.

    Args:
        tokens: each prompt's tokens at its positions.
        there: (prompts, positions), bool.
        found: columns; each value's first dimensions are (prompts, layers, positions), as a tensor or nested lists.
    """
    values = {name: _listed(value) for name, value in found.items()}
    rows = [
        {
            "prompt": prompt, "position": position, "token": token, "layer": layer,
            **{name: value[prompt][number][position] for name, value in values.items()},
        }
        for prompt, each in enumerate(tokens)
        for position, token in enumerate(each) if there[prompt, position]
        for number, layer in enumerate(layers)
    ]  # fmt: skip
    return _columns(rows)


def by_site(
    tokens: Sequence[Sequence[str]], layers: Sequence[int], heads: Sequence[int], found: dict[str, torch.Tensor]
) -> Columns:
    """One row a pair, layer, position and, where there are heads, head.

    Args:
        found: columns, each (pairs, layers, positions[, heads]).
    """
    values = {name: _listed(value) for name, value in found.items()}
    rows = []
    for pair, each in enumerate(tokens):
        for number, layer in enumerate(layers):
            for position, token in enumerate(each):
                place = {"pair": pair, "layer": layer, "position": position, "token": token}
                spot = {name: value[pair][number][position] for name, value in values.items()}
                if not heads:
                    rows.append({**place, **spot})
                for at, head in enumerate(heads):
                    rows.append({**place, "head": head, **{name: value[at] for name, value in spot.items()}})
    return _columns(rows)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _columns(rows: list[dict[str, Any]]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}
