"""What the user sees while a request is away: one line that changes, and the lines that the block printed.

In a terminal rich keeps the line, in a notebook it is HTML, and where nobody looks (a file, a batch job) only what
the block printed is passed on. What it must not know: the service.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ._events import Event

SHORT_ID = 8
REFRESH_SECONDS = 0.125
NOTEBOOK_SECONDS = 0.5
"""Each update of a notebook's line is a message to its browser."""
BAR = 20


class Screen(Protocol):
    """Where lines go."""

    def start(self, line: Callable[[], str]) -> None:
        """Show what `line` says, as often as this screen likes, until the end."""

    def changed(self) -> None:
        """The line says something new."""

    def say(self, text: str) -> None:
        """A line of the block's own."""

    def end(self, last: str) -> None:
        """Take the changing line away and leave this; "" for nothing."""


class Silent:
    def start(self, line: Callable[[], str]) -> None:
        pass

    def changed(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def end(self, last: str) -> None:
        pass


class Plain(Silent):
    """No terminal: the block's own lines to standard output; with `loud`, what changes to standard error."""

    def __init__(self, *, loud: bool = False) -> None:
        self._loud = loud

    def say(self, text: str) -> None:
        print(text, flush=True)

    def end(self, last: str) -> None:
        if self._loud and last:
            print(last, file=sys.stderr, flush=True)


class Terminal(Silent):
    def __init__(self) -> None:
        self._live: Any = None

    def start(self, line: Callable[[], str]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots")

        def render() -> Any:
            spinner.update(text=Text(line(), no_wrap=True, overflow="ellipsis"))
            return spinner

        console = Console(stderr=True, highlight=False)
        self._live = Live(
            console=console, get_renderable=render, refresh_per_second=1 / REFRESH_SECONDS, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._live.start()

    def say(self, text: str) -> None:
        if self._live is not None and sys.stdout.isatty():
            self._live.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def end(self, last: str) -> None:
        if self._live is not None:
            self._live.stop()
            if last:
                self._live.console.print(last, markup=False, style="dim", soft_wrap=True)
            self._live = None


class Notebook(Silent):
    """A cell's output: IPython's display, updated in place."""

    def __init__(self) -> None:
        self._line: Callable[[], str] = str
        self._handle: Any = None
        self._shown = 0.0

    def start(self, line: Callable[[], str]) -> None:
        self._line = line
        self._show(line(), "dim")

    def changed(self) -> None:
        if time.monotonic() - self._shown >= NOTEBOOK_SECONDS:
            self._show(self._line(), "dim")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def end(self, last: str) -> None:
        self._show(last, "end")
        self._handle = None

    def _show(self, text: str, kind: str) -> None:
        from IPython.display import HTML, display

        self._shown = time.monotonic()
        block = HTML(as_html(text, kind))
        if self._handle is None:
            self._handle = display(block, display_id=True)
        else:
            self._handle.update(block)


def as_html(text: str, kind: str) -> str:
    """A line for a notebook's cell."""
    faded = "opacity:0.7;" if kind == "dim" else ""
    return f'<pre style="margin:0;{faded}">{html.escape(text)}</pre>'


def screen(wanted: bool | None) -> Screen:
    """The screen that fits: `wanted` as in `Choices.progress`."""
    if wanted is False or (wanted is None and _nnsight_is_quiet()):
        return Silent()
    if _in_notebook():
        return Notebook()
    if sys.stderr.isatty():
        return Terminal()
    return Plain(loud=wanted is True)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; IPython in a terminal is a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _nnsight_is_quiet() -> bool:
    """CONFIG.APP.REMOTE_LOGGING = False silences nnsight's own client, and so this one."""
    module = sys.modules.get("nnsight.schema.config")
    return module is not None and not module.CONFIG.APP.REMOTE_LOGGING


class Progress:
    """The line of one request."""

    def __init__(self, shown: Screen, request_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen = shown
        self._clock = clock
        self._id = request_id
        self._began = self._since = clock()
        self._status, self._description, self._trouble = "WAITING" if request_id else "SENDING", "", ""
        self._total: int | None = None
        self._there = self._come = 0

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Show the line while the block runs."""
        self._screen.start(self.line)
        try:
            yield self
        except BaseException:
            self._screen.end("")
            raise
        self._screen.end(f"{self._id} {self._status} after {duration(self._clock() - self._began)}")

    def named(self, request_id: str) -> None:
        """It was sent, and this is its id."""
        self._id, self._status, self._trouble = request_id, "SENT", ""
        self._screen.changed()

    def event(self, event: Event) -> None:
        if event.status == "LOG":
            self._screen.say(event.description)
            return
        if event.status != self._status:
            self._since = self._clock()
        self._status, self._description = event.status, "" if event.terminal else event.description
        self._screen.changed()

    def trouble(self, why: str) -> None:
        self._trouble = why
        self._screen.changed()

    def download(self, total: int) -> None:
        """A result of so many bytes is being read."""
        self._total, self._since = total, self._clock()
        self._screen.changed()

    def recalled(self, size: int) -> None:
        """So many of them were there before."""
        self._there += size

    def advance(self, size: int) -> None:
        self._come += size
        self._screen.changed()

    def line(self) -> str:
        now, name = self._clock(), self._id[:SHORT_ID]
        if self._trouble:
            return f"{name} the service does not answer, trying again ({self._trouble})"
        if self._total:
            return f"{name} {reading(self._total, self._there, self._come, now - self._since)}"
        text = f"{name} {self._status} {duration(now - self._since)}"
        return f"{text}  {self._description}" if self._description else text


def reading(total: int, there: int, come: int, seconds: float) -> str:
    """How far a download is: share, sizes, rate and time left.

    Args:
        total: bytes in all.
        there: bytes that lay on disk before.
        come: bytes that came in `seconds`.
    """
    done = min(total, there + come)
    filled = BAR * done // total
    text = f"{'━' * filled}{'╌' * (BAR - filled)} {100 * done // total}% of {size(total)}"
    if seconds < 0.5 or come <= 0:
        return text
    rate = come / seconds
    return f"{text}, {size(rate)}/s, {duration((total - done) / rate)} left"


def size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
