"""JSON for the command line: workers and models as they are now, and why no worker comes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edif_hpc.core.queue import Queue, keys
from edif_hpc.core.tally import slurm_commands
from edif_hpc.core.target import Target
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.memory import required_bytes

from .auth import Auth
from .observed import Observed
from .public import Public


class Overview:
    def __init__(self, auth: Auth, observed: Observed, queue: Queue, public: Public) -> None:
        self.auth = auth
        self.observed = observed
        self.queue = queue
        self.public = public

    async def workers(self, request: Request) -> Response:
        """What workers say of themselves, the fleet of those it cannot start, and how often Slurm was asked for it.

        Process ids and environments are the admin's.
        """
        user = await self.auth.user(request)
        hidden = set() if user.admin else {"pid", "host", "environment"}
        rows = [worker.model_dump(mode="json", exclude=hidden) for worker in await self.observed.workers()]
        notices = await self.queue.redis.hgetall(keys.NOTICES)
        told = {subject.decode(): sentence.decode() for subject, sentence in notices.items()}
        slurm = await slurm_commands(self.queue.redis)
        return JSONResponse({"workers": rows, "notices": told, "slurm_commands": slurm})

    async def models(self, request: Request) -> Response:
        """Models in the cache with their size, where they are held, and how many requests wait for them."""
        await self.auth.user(request)
        waiting: dict[str, int] = {}
        for target, count in (await self.queue.waiting()).items():
            for key in Target.parse(target).keys:
                waiting[key.repo_id] = waiting.get(key.repo_id, 0) + count
        held: dict[str, list[dict[str, object]]] = {}
        for worker in await self.observed.workers():
            for model in worker.models:
                held.setdefault(ModelKey.parse(model.model_key).repo_id, []).append(
                    {"worker": worker.worker_id, "state": model.state, "running": model.running, "error": model.error}
                )
        rows = [
            {
                "repo_id": checkpoint.repo_id,
                "commit": checkpoint.commit,
                "dtype": checkpoint.dtype,
                "parameters": checkpoint.parameters,
                "stored_bytes": checkpoint.stored_bytes,
                "memory_bytes": required_bytes(checkpoint),
                "adapter": checkpoint.adapter,
                "base": checkpoint.base,
                "workers": held.get(checkpoint.repo_id, []),
                "waiting": waiting.get(checkpoint.repo_id, 0),
            }
            for checkpoint in await self.public.models()
        ]
        return JSONResponse({"models": rows})
