"""Getting the next generation of a lineage from Slurm, once.

`submit_once` needs only Slurm, and is all that a worker's errand takes: the worker holds the intent in Redis. Who asks
without a worker, as a supervisor whose worker died or a fleet that repairs, takes the intent with `succeed`.
"""

from __future__ import annotations

import asyncio
import secrets

from edif_hpc.core.endpoints import RedisEndpoint
from edif_hpc.core.errors import EdifError
from edif_hpc.core.home import Home
from edif_hpc.core.lineage import Answer, Lineages

from .commands import Slurm
from .order import Order
from .submit import submit
from .text import Phase


def dependency_of(order: Order, predecessor: str) -> str:
    """What a successor waits for: never beside one of its own name, in requeue mode not beside its predecessor."""
    if order.pool.handover == "requeue" and predecessor:
        return f"afterany:{predecessor},singleton"
    return "singleton"


def submit_once(home: Home, order: Order, slurm: Slurm, dependency: str) -> str:
    """The allocation of this order: the one that Slurm has already, else a new one.

    Raises:
        ComponentError: Slurm does not say what there is, and nothing was submitted; or it refused.
    """
    found = find(order, slurm)
    return found or submit(home, order, slurm, dependency=dependency)


def find(order: Order, slurm: Slurm) -> str:
    """The allocation of this name that is pending or runs; empty: there is none.

    Raises:
        SlurmSilent: nobody knows.
    """
    name = order.name.allocation
    living = (seen for seen in slurm.allocations() if seen.phase is not Phase.ENDED)
    return next((seen.job_id for seen in living if seen.name == name), "")


def succeed(home: Home, endpoint: RedisEndpoint, order: Order, slurm: Slurm, predecessor: str) -> str | None:
    """See to it that this generation exists, whoever else wants that too. Blocks; may take minutes.

    Returns:
        Its allocation; empty: somebody else is getting it; None: the lineage has ended.

    Raises:
        ComponentError: as `submit_once`.
        RedisError: Redis is away, and nothing was submitted.
    """
    return asyncio.run(_succeed(home, endpoint, order, slurm, predecessor))


async def _succeed(home: Home, endpoint: RedisEndpoint, order: Order, slurm: Slurm, predecessor: str) -> str | None:
    taker = secrets.token_hex(8)
    async with endpoint.client(connections=2) as redis:
        lineages = Lineages(redis)
        intent = await lineages.take(order.lineage, order.generation, taker)
        if intent.answer is Answer.ENDED:
            return None
        if intent.answer is not Answer.YOURS:
            return intent.detail if intent.answer is Answer.SUBMITTED else ""
        try:
            job_id = await asyncio.to_thread(find, order, slurm)
        except EdifError:
            await lineages.abandon(order.lineage, order.generation, taker)
            raise
        # From here on the intent is kept whatever happens: an allocation may exist that Slurm did not tell of.
        dependency = dependency_of(order, predecessor)
        job_id = job_id or await asyncio.to_thread(submit, home, order, slurm, dependency=dependency)
        return await lineages.record(order.lineage, order.generation, job_id)


def recall(order: Order, slurm: Slurm) -> str:
    """Cancel the allocation of this order if it has not started. Returns it, or "" when there was none.

    Raises:
        ComponentError: Slurm does not say what there is.
    """
    name = order.name.allocation
    pending = [seen.job_id for seen in slurm.allocations() if seen.name == name and seen.phase is Phase.PENDING]
    slurm.cancel(pending)
    return ",".join(pending)


def reason(error: BaseException) -> str:
    """Why there is no successor, in one line."""
    return str(error) if isinstance(error, EdifError) else f"{type(error).__name__}: {error}"
