"""What a request waits for: one model, or a set of them that one worker must hold, and the pool it may be asked of.

A target is a text, since it names keys in Redis. That of one model from any pool is the model's key and nothing else;
a set has one key a line, sorted, so that everybody who needs the same models stands in the same line.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ModelKeyError
from .wire import ModelKey

POOL = "pool "
"""Begins the last line of a target that only one pool's workers may serve; no model key begins so."""


@dataclass(frozen=True)
class Target:
    """Args: keys: the models, sorted, each once. pool: empty for any."""

    keys: tuple[ModelKey, ...]
    pool: str = ""

    @classmethod
    def of(cls, keys: list[ModelKey], pool: str = "") -> Target:
        return cls(tuple(sorted(set(keys), key=str)), pool)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target.

        Raises:
            ModelKeyError: it is none.
        """
        lines = text.split("\n")
        pool = lines.pop().removeprefix(POOL) if lines[-1].startswith(POOL) else ""
        if not lines:
            raise ModelKeyError("A target names no model.")
        return cls(tuple(ModelKey.parse(line) for line in lines), pool)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.keys), *([f"{POOL}{self.pool}"] if self.pool else [])])

    @property
    def single(self) -> bool:
        """Whether any worker that has the one model may take it."""
        return len(self.keys) == 1 and not self.pool

    @property
    def name(self) -> str:
        """The models by their repo ids, for people."""
        return " + ".join(key.repo_id for key in self.keys)
