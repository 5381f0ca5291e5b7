"""POST /api/scripts: a whole script as one request, which waits for every model that it names.

It comes from our own command line, so what cannot be had is refused here and now, with nothing queued: there is no
stock client that would wait for a status. The script itself stays opaque bytes.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edif_hpc.core.errors import ModelError
from edif_hpc.core.queue import Submission
from edif_hpc.core.scripts.envelope import ScriptEnvelope
from edif_hpc.core.settings import Settings
from edif_hpc.core.target import Target
from edif_hpc.core.wire import Kind, Status, status_message

from .auth import Auth
from .door import Door
from .intake import IDEMPOTENCY_HEADER, VERSION_LENGTH, Intake, new_id
from .multipart import Payload, read_form

LOCAL_POOL = "local"
"""The pool of a service that describes none."""


class Scripts:
    def __init__(self, settings: Settings, auth: Auth, door: Door, intake: Intake) -> None:
        self.settings = settings
        self.auth = auth
        self.door = door
        self.intake = intake

    async def post(self, request: Request) -> Response:
        user = await self.auth.user(request)
        limits = self.settings.limits
        payload = Payload(limits.inline_bytes, self.intake.spool)
        try:
            envelope = ScriptEnvelope.read(await read_form(request, payload, limits.payload_bytes))
            target = Target.of(envelope.keys(), envelope.pool)
            self._check(target, envelope.seconds)
            if refusal := await self.door.refusal(target, {}, envelope.seconds):
                raise ModelError(refusal)
            idempotency_key = request.headers.get(IDEMPOTENCY_HEADER, "")
            request_id = new_id(user, idempotency_key)
            request.scope["edif_notes"].update(request=request_id, user=user.name, bytes=payload.size)
            submission = Submission(
                request_id=request_id,
                user=user.name,
                target=str(target),
                kind=Kind.SCRIPT.value,
                record={
                    "models": [str(key) for key in target.keys],
                    "name": envelope.name,
                    "file": envelope.file,
                    "form": envelope.form,
                    "seconds": envelope.seconds,
                    "bytes": payload.size,
                    "python": request.headers.get("python-version", "")[:VERSION_LENGTH],
                },
                priority=user.priority,
                declared_seconds=envelope.seconds,
            )
            await self.intake.accept(submission, payload, again=bool(idempotency_key))
        finally:
            payload.close()
        models = [key.repo_id for key in target.keys]
        return JSONResponse(
            {**status_message(request_id, Status.RECEIVED.value, "Accepted."), "models": models, "name": envelope.name}
        )

    def _check(self, target: Target, seconds: float) -> None:
        """Whether there could be a worker for it at all, and whether it may run for so long.

        Raises:
            ModelError: neither now nor later.
        """
        limits, pools = self.settings.limits, self.settings.pool
        if seconds > limits.script_seconds:
            raise ModelError(
                f"This would run {seconds:.0f} s, and a script may run {limits.script_seconds:.0f} s here; split it "
                "or ask the admin to raise limits.script_seconds."
            )
        if self.settings.models.tensor_parallel > 1:
            raise ModelError(
                "Scripts do not run on models that are split over several ranks (models.tensor_parallel) yet; send the "
                "script's traces with remote=True instead."
            )
        names = [pool.name for pool in pools] or [LOCAL_POOL]
        if target.pool and target.pool not in names:
            raise ModelError(f"There is no pool {target.pool!r} here; there are: {', '.join(names)}.")
        able = [pool for pool in pools if all(pool.serves(key.repo_id) for key in target.keys)]
        if pools and not any(target.pool in ("", pool.name) for pool in able):
            where = f"The pool {target.pool} does not serve" if target.pool else "No pool of this service serves"
            raise ModelError(f"{where} {target.name} on one worker; see `edif-hpc pool list`.")
