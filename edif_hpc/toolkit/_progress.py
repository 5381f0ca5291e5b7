"""How far a method is: a bar of rich's where somebody looks, now and then a line where the work runs at the service.

What is printed there reaches the user as it comes, through the events of the request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

LINE_SECONDS = 10.0
"""Between two lines; short work says nothing."""

Item = TypeVar("Item")


def way(progress: bool | None, remote: bool | str) -> str:
    """How to tell it: `bar`, `lines` or `off`.

    Args:
        progress: None shows a bar in terminals and notebooks, and lines of long remote work; False nothing.
    """
    if progress is False:
        return "off"
    if remote:
        return "lines"
    return "bar"


def tracked(items: Sequence[Item], label: str, how: str, weights: Sequence[int] | None = None) -> Iterator[Item]:
    """The items, one after the other, with `weights` of them (else each as 1) told as done."""
    sizes = list(weights) if weights is not None else [1] * len(items)
    if how == "bar":
        yield from _with_bar(items, label, sizes)
    elif how == "lines":
        yield from _with_lines(items, label, sizes)
    else:
        yield from items


def _with_bar(items: Sequence[Item], label: str, sizes: list[int]) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if len(items) < 2 or not (console.is_terminal or console.is_jupyter):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=sum(sizes))
        for item, size in zip(items, sizes, strict=True):
            yield item
            bar.advance(task, size)


def _with_lines(items: Sequence[Item], label: str, sizes: list[int]) -> Iterator[Item]:
    done, total, said = 0, sum(sizes), time.monotonic()
    for item, size in zip(items, sizes, strict=True):
        yield item
        done += size
        if time.monotonic() - said >= LINE_SECONDS and done < total:
            said = time.monotonic()
            print(f"{label}: {done} of {total}")
