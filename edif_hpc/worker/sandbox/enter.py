"""The one call a forked executor makes before it looks at a request."""

from __future__ import annotations

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.sandbox.policy import Policy, Reach


def enter(policy: Policy, reach: Reach | None = None) -> Isolation:
    """Lock the calling process down as `policy` says and return the level reached; there is no way back.

    `reach` is what `probe()` said, asked once in the zygote so that a fork pays nothing for it; None asks now.
    """
    raise NotImplementedError
