"""The form of the table: an attack, what becomes of it at each level, and what it may leave behind.

An attack is a function of one dict, which says what lies around it (see `ground`). It travels to the service by value
with the block, so it and its helpers use nothing but the standard library, torch, and what the dict tells them.

Outcomes, as patterns that must match from the beginning:

- `DID`: it worked; this level does not keep a block from it. `none` and `process` promise little about the rest of the
  user's world, and the table says so row by row.
- `REFUSED`: the kernel said no.
- `ERROR ...`: the request ended in ERROR with that sentence.
- anything else is what the attack itself returned, or the exception that it met.
- `SPARED`: not tried. At `none` nothing limits it, so it would hurt the machine that runs the tests, or it damages only
  the model host, which that level says; elsewhere another row tells the same.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NONE, PROCESS, LOCKED = "none", "process", "locked"
LEVELS = (NONE, PROCESS, LOCKED)

DID = "did"
REFUSED = "refused"
SPARED = "spared"
EITHER = f"{DID}|{REFUSED}"

Attack = Callable[[dict[str, Any]], Any]
After = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        attack: what is tried.
        expected: level -> pattern.
        bare: the attack is the block itself, and whatever it raises is the block's; else its exceptions are outcomes.
        spoils: levels at which the process that serves requests is damaged for good: there, and only there, an honest
            request may fail or be wrong until that process is replaced. Only `none` may ever stand here.
        after: a look from outside, `after(ground, level, outcome)`, before the honest request.
    """

    attack: Attack
    expected: dict[str, str]
    bare: bool = False
    spoils: tuple[str, ...] = ()
    after: After | None = None
    levels: tuple[str, ...] = field(default=LEVELS)

    @property
    def name(self) -> str:
        return self.attack.__name__


TABLE: list[Case] = []


def rows(level: str) -> list[Case]:
    """What is tried at a level."""
    return [row for row in TABLE if level in row.levels]


def case(
    none: str,
    process: str,
    locked: str,
    *,
    bare: bool = False,
    spoils: tuple[str, ...] = (),
    after: After | None = None,
) -> Callable[[Attack], Attack]:
    """Enter a function into the table."""

    def enter(attack: Attack) -> Attack:
        expected = {NONE: none, PROCESS: process, LOCKED: locked}
        levels = tuple(level for level in LEVELS if expected[level] != SPARED)
        TABLE.append(Case(attack, expected, bare, spoils, after, levels))
        return attack

    return enter


def attempt(attack: Attack, g: dict) -> str:
    """Run an attack where the block runs, and say what came of it in a few words."""
    try:
        found = attack(g)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            return "refused"
        return f"OSError {errno.errorcode.get(error.errno or 0)}"
    except BaseException as error:  # noqa: BLE001 - whatever it met is the outcome
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "did" if found is None else str(found)
