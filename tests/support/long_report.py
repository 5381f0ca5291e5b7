"""Writes the result of `make test-long` into the README: a pytest plugin, loaded by that target alone.

The table is replaced only by a whole run: one that was narrowed down or interrupted leaves it, and says so.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from tests.support.models import REPO

README = REPO / "README.md"
MARKER = "test-long"


@dataclass
class Row:
    """One test: its docstring's first line, else its name in words."""

    what: str
    outcome: str = "passed"
    seconds: float = 0.0


class LongReport:
    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.narrowed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.narrowed = bool(config.option.keyword or config.args != config.getini("testpaths"))
        for item in items:
            said = inspect.getdoc(getattr(item, "function", None)) or item.name.removeprefix("test_").replace("_", " ")
            case = f": {item.callspec.id}" if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""
            self.rows[item.nodeid] = Row(said.splitlines()[0].rstrip(".") + case)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows[report.nodeid]
        row.seconds += report.duration
        if report.outcome != "passed":
            row.outcome = f"**{report.outcome}**"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        whole = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not self.narrowed and self.rows
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if whole:
            README.write_text(replaced(README.read_text(), self.table(), MARKER))
        if reporter:
            what = "has the result" if whole else "is as it was: this was not a whole run"
            reporter.write_line(f"\n{README} {what}.")

    def table(self) -> str:
        """The table in Markdown, with a sentence that says when and on what."""
        passed = sum(row.outcome == "passed" for row in self.rows.values())
        seconds = sum(row.seconds for row in self.rows.values())
        head = (
            f"Last run on {datetime.now(UTC):%Y-%m-%d}, {_slurm()}, {os.cpu_count()} cores: {passed} of "
            f"{len(self.rows)} passed in {seconds / 60:.0f} minutes.\n\n"
            "| what happens | result | time |\n|---|---|---|\n"
        )
        return head + "".join(f"| {row.what} | {row.outcome} | {row.seconds:.0f} s |\n" for row in self.rows.values())


def replaced(text: str, table: str, marker: str) -> str:
    """The README with this table in the place of the last one that `make MARKER` wrote."""
    begin, end = f"<!-- {marker}:begin (written by `make {marker}`) -->\n", f"<!-- {marker}:end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{README} has no place for the table: {begin.strip()} … {end}")
    return f"{before}{begin}{table}{end}{after}"


def _slurm() -> str:
    """The version, of the daemon: the commands tell none without a configuration."""
    daemon = shutil.which("slurmd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if daemon is None:
        return "no Slurm"
    return subprocess.run([daemon, "-V"], capture_output=True, text=True, check=True).stdout.strip()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LongReport(), "long-report")
