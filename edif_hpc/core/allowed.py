"""What an admin allows requests to bring up. Gateway and worker ask the same question, each for itself."""

from __future__ import annotations

from fnmatch import fnmatchcase

from .errors import ModelError
from .settings import ModelSettings
from .wire import ModelKey


def check_model(models: ModelSettings, key: ModelKey) -> None:
    """Refuse a model that requests may not bring up, or whose own code may not run.

    Raises:
        ModelError: naming the setting that would allow it.
    """
    if not any(fnmatchcase(key.repo_id, pattern) for pattern in models.allow):
        raise ModelError(
            f"The model {key.repo_id!r} may not be used on this service; ask its admin to add it to models.allow."
        )
    if key.trust_remote_code and key.repo_id not in models.trust_remote_code:
        raise ModelError(
            f"The model {key.repo_id!r} would run its own Python code on load; use trust_remote_code=False, or "
            "ask this service's admin to add it to models.trust_remote_code."
        )
