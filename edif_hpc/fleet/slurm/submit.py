"""Submitting one allocation through submitit: the order into a file, the supervisor as what runs."""

from __future__ import annotations

from subprocess import CalledProcessError

from submitit.core.utils import FailedJobError, FailedSubmissionError

from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home

from .commands import Slurm, Unsure
from .order import Order, folder, sweep, write_order
from .script import Executor, parameters
from .text import first_error, is_refusal


def submit(home: Home, order: Order, slurm: Slurm, *, dependency: str = "") -> str:
    """Submit an allocation and return its id.

    Args:
        slurm: whose books this goes into.

    Raises:
        Unsure: nobody knows whether it exists; look before trying again.
        ComponentError: Slurm refused it; with what Slurm said.
    """
    from .supervisor import supervise  # which submits as well, and so imports this module

    path = write_order(home, order)
    sweep(home.root)
    try:
        executor = Executor(folder(home.root), order.slurm)
        executor.update_parameters(**parameters(order.pool, order.name, dependency=dependency))
        slurm.count("sbatch")
        return str(executor.submit(supervise, str(path)).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        said, pool = first_error(str(error)), order.pool.name
        status = error.__cause__.returncode if isinstance(error.__cause__, CalledProcessError) else 0
        if not is_refusal(str(error), status):
            raise Unsure(f"Slurm did not tell what became of an allocation of the pool {pool}: {said}") from error
        raise ComponentError(f"Slurm refused an allocation of the pool {pool}: {said}") from error
    except (RuntimeError, OSError) as error:  # submitit finds no srun, or no sbatch
        raise ComponentError(f"No allocation could be submitted from here: {error}") from error
