"""What the processes of a model host ask of the kernel about themselves, and the clean environment they start with.

None of them may outlive the agent, be traced by another process of the same user, or fall to a signal that Slurm sends
to a whole allocation: the agent alone decides when they end. No torch here.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping

from edif_hpc.worker.contract import HostSpec
from edif_hpc.worker.sandbox.kernel import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")
PASSED_ON_PREFIXES = (
    "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "HSA_", "GPU_DEVICE_", "MIOPEN_", "NCCL_", "RCCL_", "FI_",
)  # fmt: skip
PAGE = resource.getpagesize()


def clean_environment(spec: HostSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of host and zygote: an allow-list of what is inherited, and offline libraries.

    Nothing of the user's own configuration is read: nnsight would take an API key from it.
    """
    kept = {key: value for key, value in inherited.items() if key in PASSED_ON or key.startswith(PASSED_ON_PREFIXES)}
    scratch = str(spec.scratch)
    return {
        "LANG": "C.UTF-8",
        **kept,
        "HOME": scratch,
        "XDG_CACHE_HOME": scratch,
        "XDG_CONFIG_HOME": scratch,
        "NNSIGHT_CONFIG": os.devnull,
        "HF_HOME": scratch,
        "HF_HUB_CACHE": str(spec.cache),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",  # the tokenizers' pool starts all the same, and its idle threads spin first
        "OMP_NUM_THREADS": str(spec.threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **(_ranks_environment(spec) if spec.ranks > 1 else {}),
    }


def _ranks_environment(spec: HostSpec) -> dict[str, str]:
    """What the ranks of a model have in common: the order of their sets, and a network that ends in this machine."""
    shared = {"PYTHONHASHSEED": str(int.from_bytes(os.urandom(4), "little")), "GLOO_SOCKET_IFNAME": "lo"}
    # transformers takes an accelerator wherever it sees one.
    return shared | ({"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"} if spec.device == "cpu" else {})


def zygote_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """One thread everywhere, since forks inherit no pools; huge pages for the heap make forks cheaper."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**inherited, **single, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@contextlib.contextmanager
def held(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Let these signals wait while something is done, and in a process that is started meanwhile until it unblocks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_process(parent: int) -> None:
    """Die with the parent, be nobody's to trace, and leave allocation-wide signals to the agent."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    prctl(PR_SET_DUMPABLE, 0)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # the agent held them until we would not fall to one


def kill(pidfd: int) -> None:
    """SIGKILL to exactly that process; nothing when it has ended already."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def become_subreaper() -> None:
    """Inherit orphaned descendants instead of leaving them to init."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def address_budget(budget: int) -> Iterator[None]:
    """So many bytes of address space for one request, 0 for no limit; soft, since this process lives on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if budget:
        hard = before[1]
        wanted = mapped_bytes() + budget
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mapped_bytes() -> int:
    """The size of this process's address space, which RLIMIT_AS counts."""
    return _statm()[0]


def private_bytes() -> int:
    """Resident memory that no file backs, which is what this process costs the machine."""
    _, resident, shared = _statm()
    return resident - shared


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def own_tasks() -> int:
    """How many threads this user has on the machine, which is what RLIMIT_NPROC compares with.

    Read from `status`: the folder of a process that is not dumpable, as most of ours are, belongs to root.
    """
    count, uid = 0, os.getuid()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/status", "rb") as handle:
                    fields = dict(line.split(b":", 1) for line in handle.read().splitlines())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked, or is hidden and so not ours
            if int(fields[b"Uid"].split()[0]) == uid:
                count += int(fields[b"Threads"])
    return count


def _statm() -> tuple[int, int, int]:
    with open("/proc/self/statm", "rb") as handle:
        size, resident, shared = handle.read().split()[:3]
    return int(size) * PAGE, int(resident) * PAGE, int(shared) * PAGE
