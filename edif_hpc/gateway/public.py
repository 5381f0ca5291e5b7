"""What anybody may ask, since the stock client asks it without a key: ping, status, env, whoami."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edif_hpc.core.registry import ModelState, Registry
from edif_hpc.core.wire import ModelKey
from edif_hpc.hardware.checkpoint import Checkpoint, list_models

from .auth import Auth
from .observed import Observed

CACHE_SECONDS = 10.0
STATES: dict[ModelState, tuple[str, str]] = {
    "ready": ("HOT", "RUNNING"),
    "loading": ("WARM", "DEPLOYING"),
    "failed": ("WARM", "UNHEALTHY"),
}
"""Of a model on a worker -> NDIF's deployment level and application state."""


class Public:
    def __init__(self, auth: Auth, observed: Observed, registry: Registry, cache: Path) -> None:
        self.auth = auth
        self.observed = observed
        self.registry = registry
        self.cache = cache
        self._listed: tuple[float, list[Checkpoint]] = (0.0, [])

    async def ping(self, request: Request) -> Response:
        return JSONResponse("pong")

    async def whoami(self, request: Request) -> Response:
        """An unknown key is no error here: the stock client's login only wants to know."""
        user = await self.auth.find(request)
        return JSONResponse({"email": user.name if user else None, "tags": list(user.tags) if user else []})

    async def env(self, request: Request) -> Response:
        """Of the last worker there was, so that compare() answers while none is up; else this gateway's own."""
        return JSONResponse(await self.registry.environment() or await asyncio.to_thread(_own_environment))

    async def status(self, request: Request) -> Response:
        """One entry per model on a worker, and one COLD per model that could be brought up."""
        deployments: dict[str, dict[str, Any]] = {}
        for worker in await self.observed.workers():
            for model in worker.models:
                key = ModelKey.parse(model.model_key)
                # Numbered: anybody may ask, and which machines there are is not for everybody.
                deployments[f"{key.repo_id}#{len(deployments)}"] = _deployment(key, *STATES[model.state])
        held = {entry["repo_id"] for entry in deployments.values()}
        for checkpoint in await self.models():
            if checkpoint.repo_id not in held and not checkpoint.adapter:
                deployments[checkpoint.repo_id] = {
                    "deployment_level": "COLD", "application_state": "NOT_STARTED", "model_key": None,
                    "repo_id": checkpoint.repo_id, "task": None, "trust_remote_code": False, "revision": "main",
                }  # fmt: skip
        return JSONResponse({"deployments": deployments})

    async def models(self) -> list[Checkpoint]:
        """Models in the cache, looked at now and then."""
        until, found = self._listed
        if time.monotonic() >= until:
            found = await asyncio.to_thread(list_models, self.cache)
            self._listed = (time.monotonic() + CACHE_SECONDS, found)
        return found


def _deployment(key: ModelKey, level: str, state: str) -> dict[str, Any]:
    return {
        "deployment_level": level,
        "application_state": state,
        "model_key": str(key),
        "repo_id": key.repo_id,
        "task": key.task,
        "trust_remote_code": key.trust_remote_code,
        "revision": key.revision or "main",
    }


def _own_environment() -> dict[str, Any]:
    from importlib.metadata import distributions, packages_distributions

    versions = {found.metadata["Name"]: found.version for found in distributions()}
    packages = {name: versions[owners[0]] for name, owners in packages_distributions().items() if owners[0] in versions}
    return {"python_version": sys.version, "packages": packages}
