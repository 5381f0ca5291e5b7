"""The one call a forked executor makes before it looks at a request.

Level `process` covers: an empty environment, closed descriptors, no standard streams, a session of its own, death with
the host, resource limits (see `rlimits`), no gain of privileges, not dumpable, an unprivileged uid of its own when
started as root. It does **not** keep the code from files, the network, other processes of the same uid, or from
forking: a child that calls setsid is not killed with the executor, only counted.

Level `locked` adds Landlock (see `landlock`, `paths`) and seccomp (see `seccomp`). Neither suffices alone.

What remains under `locked`: the heap that the process was forked from, and copies of the environment in it, so the
zygote must never hold a secret; everything reachable through the kept descriptors, so the other side must treat what
it reads as a stranger's word and pass no descriptor it would not give away; existence, size, times and owner of files
that the uid may look up (stat and readlink cannot be restricted); the sum of files in a scratch; CPU and memory
bandwidth, caches and other side channels; bugs in the kernel. As an ordinary user the supplementary groups stay.

With accelerators (`Policy.devices`, never run on one): all ioctls on the devices are allowed, so the driver is part of
what must hold; the device's memory is not limited here; initialise the device before, since the JIT compilers exec.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from edif_hpc.core.isolation import Isolation
from edif_hpc.worker.sandbox import descriptors, identity, landlock, paths, rlimits, seccomp
from edif_hpc.worker.sandbox.kernel import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, machine, prctl
from edif_hpc.worker.sandbox.policy import Policy, Reach, SandboxError
from edif_hpc.worker.sandbox.probe import probe


def enter(policy: Policy, reach: Reach | None = None) -> Isolation:
    """Lock the calling process down as `policy` says and return the level reached; there is no way back.

    Call it in a process that was just forked, with one thread, and after the weights were mapped. When it raises, the
    process is in between: leave with `os._exit`.

    Args:
        policy: what to do.
        reach: what `probe()` said, asked once in the zygote so that a fork pays nothing for it; None asks now.

    Raises:
        SandboxError: the level cannot be reached; nothing was done yet. Or the parent is gone.
        OSError: the kernel refused a step that the probe had seen to work.
    """
    reach = probe() if reach is None else reach
    refuse_unreachable(policy, reach)
    pid = os.getpid()
    change_uid = policy.change_uid and reach.change_uid
    _die_with_parent(policy.parent)
    if os.getpgrp() != pid:
        os.setsid()
    if policy.nice:
        os.nice(policy.nice)
    descriptors.keep_only(policy.keep_fds)
    here = policy.scratch or Path("/")
    os.chdir(here)
    descriptors.clear_environment(here)

    # Everything that needs a path, before the uid changes and the limits fall.
    ruleset = None
    if policy.level is Isolation.LOCKED:
        ruleset = landlock.build(reach.landlock_abi, paths.rules(policy, pid))
    if change_uid and policy.scratch is not None:
        uid = identity.spare_uid(pid)
        os.chown(policy.scratch, uid, uid)
    identity.shed(change_uid, pid)
    _die_with_parent(policy.parent)  # a change of uid clears the death signal
    rlimits.apply(policy)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)
    if ruleset is not None:
        landlock.restrict_self(ruleset)
        os.close(ruleset)
        program = seccomp.assemble(machine(), pid, scratch=policy.scratch is not None, devices=bool(policy.devices))
        seccomp.load(program)
    return policy.level


def refuse_unreachable(policy: Policy, reach: Reach) -> None:
    """Raise the sentence that says why this policy cannot be entered here, before anything is changed."""
    if policy.level is Isolation.NONE:
        raise SandboxError("Isolation level none has nothing to enter: run the request without calling enter().")
    if not reach.level.covers(policy.level):
        reasons = " ".join(reach.reasons)
        raise SandboxError(
            f"Isolation level {policy.level} cannot be reached here, the strongest is {reach.level}: {reasons}"
        )
    if len(os.listdir("/proc/self/task")) > 1:
        raise SandboxError("Isolation must be entered with one thread: fork the executor first, then call enter().")
    if policy.scratch is not None and policy.change_uid and reach.change_uid:
        closed = [folder for folder in policy.scratch.parents if not os.stat(folder).st_mode & 0o001]
        if closed:
            raise SandboxError(
                f"The scratch {policy.scratch} lies in {closed[0]}, which an unprivileged uid cannot enter: put it "
                "elsewhere, or set change_uid to False."
            )


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, and notice a parent that died before."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        raise SandboxError(
            f"The parent, pid {parent}, was gone before the executor was locked down: nothing to run for."
        )
