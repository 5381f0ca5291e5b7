"""One who asks for a lineage's successors, as the service's user: `python -m tests.cluster.asker ORDER HOW`.

Reads generations from standard input, a line each, and answers each with the allocation that it got, or with `-` when
somebody else was at it. HOW is the way of a worker, whose supervisor submits while the worker holds the intent, or the
way of who has no worker, as a supervisor whose worker died and a fleet that repairs.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from pathlib import Path

from edif_hpc.core.endpoints import RedisEndpoint, Role, redis_endpoint
from edif_hpc.core.home import Home
from edif_hpc.core.lineage import Answer, Lineages
from edif_hpc.fleet.slurm import succession
from edif_hpc.fleet.slurm.commands import Slurm
from edif_hpc.fleet.slurm.order import Order, read_order
from edif_hpc.fleet.state import settings_of

PREDECESSOR = "1"


def with_worker(home: Home, endpoint: RedisEndpoint, order: Order) -> str:
    """As `worker.handover` and `fleet.slurm.errands` do it between them."""

    async def ask() -> str:
        async with endpoint.client(connections=2) as redis:
            lineages = Lineages(redis)
            intent = await lineages.take(order.lineage, order.generation, secrets.token_hex(8))
            if intent.answer is not Answer.YOURS:
                return intent.detail if intent.answer is Answer.SUBMITTED else ""
            slurm = Slurm(order.slurm)
            waits_for = succession.dependency_of(order, PREDECESSOR)
            job_id = await asyncio.to_thread(succession.submit_once, home, order, slurm, waits_for)
            return await lineages.record(order.lineage, order.generation, job_id)

    return asyncio.run(ask())


def alone(home: Home, endpoint: RedisEndpoint, order: Order) -> str:
    return succession.succeed(home, endpoint, order, Slurm(order.slurm), PREDECESSOR)


def main(path: str, how: str) -> None:
    first = read_order(Path(path))
    home = Home(first.home)
    endpoint = redis_endpoint(home, settings_of(home, first.config).settings, Role.WORKER)
    ask = {"worker": with_worker, "alone": alone}[how]
    for line in sys.stdin:
        order = first.model_copy(update={"generation": int(line)})
        print(ask(home, endpoint, order) or "-", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
