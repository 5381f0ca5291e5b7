"""Running Slurm's commands: each with a time-out, and "unknown" as an answer of its own.

A slurmctld that is busy, restarting or unreachable says nothing about allocations. Who asks must then do nothing:
reading a failed `squeue` as "nothing runs" is how runaway submissions begin.
"""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edif_hpc.core.errors import ComponentError
from edif_hpc.core.settings import SlurmSettings
from edif_hpc.core.tally import Command

from . import names
from .text import FORMAT, Seen, Unreadable, first_error, parse_squeue

ASK_SECONDS = 60.0
"""slurmctld may take this long under load; MessageTimeout is 10 s by default and often raised."""


class SlurmSilent(ComponentError):
    """Slurm did not answer, or not in a way that can be read: nothing is known."""


class Unsure(ComponentError):
    """A submission may have been taken or not: the next listing tells."""


@dataclass(frozen=True)
class Slurm:
    """The site's commands, by the names it gave them."""

    settings: SlurmSettings
    count: Callable[[Command], None] = lambda command: None
    """Called at every command, submissions included, for the books: sites count them."""

    def allocations(self) -> list[Seen]:
        """All of this user's allocations of this program that Slurm still remembers, in one call.

        Raises:
            SlurmSilent: nothing is known.
        """
        return self._squeue("--user", getpass.getuser())

    def allocation(self, job_id: str) -> Seen | None:
        """One allocation; None when Slurm does not know it any more.

        Raises:
            SlurmSilent: nothing is known.
        """
        found = [seen for seen in self.allocations() if seen.job_id == job_id]
        return found[0] if found else None

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End allocations; those that have ended already are passed over.

        Raises:
            SlurmSilent: it is not known whether they were.
        """
        if job_ids:
            self._run("scancel", self.settings.scancel, "--quiet", *job_ids)

    def _squeue(self, *options: str) -> list[Seen]:
        asked = ("--noheader", "--states=all", f"--format={FORMAT}", *options)
        said = self._run("squeue", self.settings.squeue, *asked)
        try:
            return parse_squeue(said, names.is_one)
        except Unreadable as error:
            raise SlurmSilent(f"{self.settings.squeue} gave an answer that cannot be read: {error}.") from error

    def _run(self, command: Command, program: str, *arguments: str) -> str:
        self.count(command)
        try:
            done = subprocess.run(
                [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=ASK_SECONDS, check=False, env=environment(),
            )  # fmt: skip
        except FileNotFoundError:
            raise ComponentError(
                f"There is no {program} on this machine; run this on a login node, or set the slurm section's commands."
            ) from None
        except subprocess.TimeoutExpired:
            raise SlurmSilent(f"{program} did not answer within {ASK_SECONDS:g} s.") from None
        if done.returncode != 0:
            raise SlurmSilent(f"{program} failed: {first_error(done.stderr)}")
        return done.stdout


def environment() -> dict[str, str]:
    """For Slurm's commands: ours without what would change their format or what they select."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SQUEUE_", "SBATCH_", "SCANCEL_", "SLURM_TIME_FORMAT"))
    }
