"""From a pool to the sbatch script that submitit submits. Pure but for submitit's own look for `srun`.

What goes in is what an admin wrote and what this home is; no secret, and of the environment only what is named here.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from edif_hpc.core.pools import MINUTE, Pool
from edif_hpc.core.settings import SlurmSettings
from edif_hpc.core.walltime import warning_seconds

from .names import Name

PASSED_ON = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "SHELL", "TERM", "TZ")
"""What of the submitting environment an allocation gets; sbatch adds Slurm's own."""


SUBMIT_SECONDS = 120
"""A busy slurmctld keeps sbatch trying; what it does after this is seen in the next listing."""


class Executor(SlurmExecutor):
    """submitit's executor with the site's name for `sbatch`."""

    def __init__(self, folder: Path, slurm: SlurmSettings) -> None:
        super().__init__(folder, max_num_timeout=0, python=python_command())
        self._sbatch = slurm.sbatch

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        # The first would beat the script; the others, of the allocation that submits its successor, would go along.
        foreign = sorted(name for name in os.environ if name.startswith(("SBATCH_", "SLURM_")) and name != "SLURM_CONF")
        unset = [part for name in foreign for part in ("-u", name)]
        return ["timeout", str(SUBMIT_SECONDS), "env", *unset, self._sbatch, str(submission_file_path)]


def python_command() -> str:
    """`-P`: the folder a job starts in is no place to import from."""
    return f"{shlex.quote(sys.executable)} -P"


def parameters(pool: Pool, name: Name, *, dependency: str = "") -> dict[str, Any]:
    """submitit's parameters for one allocation."""
    more: dict[str, Any] = {"no-requeue": True, "export": ",".join(PASSED_ON)}
    # `--time` is set here and not through submitit, which knows minutes alone.
    more["time"] = pool.time
    if pool.gpus:
        more["gpus"] = pool.gpus
    if pool.reservation:
        more["reservation"] = pool.reservation
    for option in pool.options:
        key, _, value = option.removeprefix("--").partition("=")
        more[key] = value or True
    wanted: dict[str, Any] = {
        "job_name": name.allocation,
        "time": max(1, pool.walltime_seconds // MINUTE),
        "nodes": pool.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": pool.cpus or None,
        "mem": pool.memory or None,
        "partition": pool.partition or None,
        "account": pool.account or None,
        "qos": pool.qos or None,
        "constraint": pool.constraint or None,
        "gres": pool.gres or None,
        "exclusive": pool.exclusive or None,
        "dependency": dependency or None,
        "signal_delay_s": int(warning_seconds(pool.walltime_seconds)),
        "wckey": None,  # submitit's own default is refused where wckeys are tracked
        "stderr_to_stdout": True,
        "setup": pool.setup or None,
        # The list above is also what srun would pass on, and it lacks what submitit exports in the script.
        # And since 22.05 srun does not take the number of cores from the job.
        "srun_args": ["--export=ALL", *([f"--cpus-per-task={pool.cpus}"] if pool.cpus else [])],
        "additional_parameters": more,
    }
    return {key: value for key, value in wanted.items() if value is not None or key == "wckey"}


def script(pool: Pool, name: Name, folder: Path, *, dependency: str = "") -> str:
    """The exact text that is submitted, but for the number in the name of a new lineage."""
    command = f"{python_command()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters(pool, name, dependency=dependency)))
