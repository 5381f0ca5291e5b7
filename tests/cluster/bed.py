"""Brings a real Slurm up on one Debian machine and takes it down, leaving nothing: no process, file, network or user.

    this machine (login side)          node1, node2
    munged, slurmctld            10.x.0.1 ── bridge ── 10.x.0.11, 10.x.0.12: slurmd, two GPUs that are none

Each node has network, process, mount and UTS namespaces of its own, with no way out but to the bridge; the files are
this machine's. A Slurm that is installed here is not touched: configuration, munge's key and socket, state and ports
are ours.

Taking it down is done by a process of its own, which waits for the end of a pipe: so it also happens when the tests
are killed. Everything is found again by what it is called or whom it belongs to, so what a killed run leaves all the
same (the machine went down, somebody killed that process too) is removed by the next.

It keeps nobody apart who is root in a job: jobs run as an ordinary user, and that is what is isolated.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.slurm import NODES, Cluster, processes

from .files import FREEZER, write_files

ROOT = Path(__file__).parents[2]
PREFIX = "edif-hpc-cluster-"
USER, COMMENT = "edif-hpc-test", "made by the tests of edif_hpc"
BRIDGE = "edifhpc0"
LINKS = ("edifhpc1", "edifhpc2")
NETWORKS = tuple(ipaddress.ip_network(f"10.{number}.0.0/24") for number in (213, 187, 149, 101))
"""The first that this machine does not use."""
PACKAGES = ("slurm-wlm", "munge", "iproute2", "passwd", "shellcheck")
PROGRAMS = (
    "munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "unshare", "setpriv", "useradd", "userdel", "shellcheck",
)  # fmt: skip
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OTHERS_SECONDS = 900
"""How long to wait for another run's cluster on this machine to be gone; all its tests take some minutes."""
DOWN_SECONDS = 60


def obstacle() -> str:
    """Why there can be no cluster here and what to do, in a sentence; empty when there can. Installs what is missing
    where that was asked for."""
    if os.geteuid() != 0:
        return "A cluster needs root, for namespaces and a user of its own: run the tests as root, in a machine for it."
    if not missing():
        return ""
    if not (os.environ.get("CI") == "true" or os.environ.get("EDIF_HPC_TEST_INSTALL") == "1"):
        return (
            f"There is no {missing()[0]} here: set EDIF_HPC_TEST_INSTALL=1 to let the tests install "
            f"{' '.join(PACKAGES)} with apt-get, or do it yourself."
        )
    if not shutil.which("apt-get"):
        return "Slurm is missing, and only Debian's packages are known here: run the tests on Debian 12."
    install()
    return f"apt-get installed {' '.join(PACKAGES)}, and there still is no {missing()[0]}." if missing() else ""


def missing() -> list[str]:
    """Programs that a cluster needs and that are not there."""
    return [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]


def install() -> None:
    """Install Debian's packages, without starting the services they bring."""
    environment = {**os.environ, "PATH": SYSTEM_PATH, "DEBIAN_FRONTEND": "noninteractive"}
    wanted = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300", "--no-install-recommends", "install", *PACKAGES]
    with services_stay_down():
        if subprocess.run(wanted, env=environment, stdin=subprocess.DEVNULL, check=False).returncode:
            # The lists of packages are missing or older than the packages: fetch them and try again.
            subprocess.run(["apt-get", "-q", "update"], env=environment, stdin=subprocess.DEVNULL, check=True)
            subprocess.run(wanted, env=environment, stdin=subprocess.DEVNULL, check=True)


@contextmanager
def services_stay_down() -> Iterator[None]:
    """Debian's packages ask this file before they start a service."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster with two idle nodes, one at a time on a machine.

    Raises:
        AssertionError: at the end, something of it is left.
    """
    with only_one() as lock:
        sweep()
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.bed"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, pass_fds=[lock.fileno()], start_new_session=True, text=True,
            env={**os.environ, "PATH": SYSTEM_PATH},
        )  # fmt: skip
        cluster = None
        try:
            cluster = prepare()
            bring_up(cluster)
            yield cluster
        finally:
            said, _ = keeper.communicate(timeout=DOWN_SECONDS)  # the end of its pipe is what it waits for
            for process in cluster.daemons.values() if cluster else ():
                process.wait()
        assert keeper.returncode == 0, f"taking the cluster down left something:\n{said}"


@contextmanager
def only_one() -> Iterator[socket.socket]:
    """Wait for our turn: an abstract socket belongs to one process and its heirs, and goes with the last of them."""
    deadline = time.monotonic() + OTHERS_SECONDS
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind("\0edif-hpc-cluster")
                break
            except OSError:
                assert time.monotonic() < deadline, (
                    f"Another run on this machine has had its cluster for {OTHERS_SECONDS} s: end it, then try again."
                )
                time.sleep(0.5)  # until it is gone
        yield lock


def prepare() -> Cluster:
    """The user, the folder and the bridge."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    folder.chmod(0o755)
    as_is = ("--home-dir", str(folder / "home"), "--no-create-home", "--shell", "/bin/bash")
    command("useradd", *as_is, "--comment", COMMENT, USER)
    user = pwd.getpwnam(USER)
    network = free_network()
    internal, *nodes = (str(network[number]) for number in (1, 11, 12))
    write_files(folder, user, internal, nodes)
    command("ip", "link", "add", BRIDGE, "type", "bridge")
    command("ip", "address", "add", f"{internal}/{network.prefixlen}", "dev", BRIDGE)
    command("ip", "link", "set", BRIDGE, "up")
    daemons = commands(folder, dict(zip(NODES, nodes, strict=True)))
    return Cluster(folder, USER, user.pw_uid, user.pw_gid, internal, daemons, attach)


def bring_up(cluster: Cluster) -> None:
    """Start everything and wait for two idle nodes."""
    cluster.start("munged")
    cluster.wait((cluster.folder / "munge" / "socket").exists, what="munge's socket")
    for daemon in ("slurmctld", *NODES):
        cluster.start(daemon)
    cluster.wait(lambda: cluster.admin("scontrol", "ping", check=False).returncode == 0, 60.0, "slurmctld answering")
    cluster.wait(cluster.all_idle, 60.0, "two idle nodes")


def commands(folder: Path, addresses: dict[str, str]) -> dict[str, list[str]]:
    """How each daemon is started."""
    munge, node = folder / "munge", folder / "node.sh"
    alone = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return {
        "munged": [
            "munged", "--foreground", f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed", f"--log-file={folder}/log/munged.log", "--num-threads=2",
        ],
        "slurmctld": ["slurmctld", "-D", "-i", "-f", str(folder / "slurm.conf")],
        **{
            name: [*alone, "bash", str(node), name, f"{address}/24", str(folder)]
            for name, address in addresses.items()
        },
    }  # fmt: skip


def attach(node: str, pid: int) -> None:
    """Put one end of a cable into a node that has just been started, and the other into the bridge."""
    link = LINKS[NODES.index(node)]
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        assert time.monotonic() < deadline, f"{node} has no network namespace of its own"
        time.sleep(0.01)  # until unshare has come to it
    remove_link(link)  # of the node as it was before it was switched off
    command("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    command("ip", "link", "set", link, "master", BRIDGE, "up")


def free_network() -> ipaddress.IPv4Network:
    """Addresses that nothing on this machine uses."""
    routes = json.loads(command("ip", "-json", "-4", "route", "show", "table", "all"))
    used = [ipaddress.ip_network(route["dst"], strict=False) for route in routes if route["dst"][0].isdigit()]
    return next(network for network in NETWORKS if not any(network.overlaps(other) for other in used))  # type: ignore[arg-type]


def command(*arguments: str) -> str:
    """Run a program of the system's; what it printed. Fails with what it complained about."""
    done = subprocess.run(
        arguments, env={**os.environ, "PATH": SYSTEM_PATH}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(arguments)} exited {done.returncode}: {done.stderr.strip()}"
    return done.stdout


def sweep() -> None:
    """Remove every trace of a cluster, whoever brought it up."""
    deadline = time.monotonic() + DOWN_SECONDS / 2
    while (found := own_processes()) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)  # for the kernel to clear them away
    for link in (*LINKS, BRIDGE):
        remove_link(link)
    for folder in folders():
        shutil.rmtree(folder, ignore_errors=True)
    for cgroup in cgroups():
        cgroup.rmdir()
    for cgroup in FREEZER.glob("slurm*"):
        with suppress(OSError):  # a Slurm of the machine's own may have jobs
            cgroup.rmdir()
    if own_user() is not None:
        command("userdel", USER)


def remains() -> list[str]:
    """What is left of a cluster, in words."""
    found = [f"process {pid}: {text_of(pid, 'cmdline')[:200]}" for pid in own_processes()]
    found += [f"network link {link}" for _, link in socket.if_nameindex() if link in (*LINKS, BRIDGE)]
    found += [f"folder {folder}" for folder in folders()]
    found += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if PREFIX in line]
    found += [f"cgroup {cgroup}" for cgroup in cgroups()]
    if own_user() is not None:
        found.append(f"user {USER}")
    return found


def own_processes() -> list[int]:
    """The daemons, by a variable in their environment, and all that runs as the user."""
    user = own_user()
    return [
        pid for pid in processes()
        if (user is not None and _uid(pid) == user.pw_uid) or "\0EDIF_HPC_TEST_BED=" in "\0" + text_of(pid, "environ")
    ]  # fmt: skip


def own_user() -> pwd.struct_passwd | None:
    """The user, if these tests made it."""
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        return None
    return user if user.pw_gecos.startswith(COMMENT) else None


def folders() -> list[Path]:
    return [path for path in Path("/tmp").glob(f"{PREFIX}*") if path.lstat().st_uid == 0 and not path.is_symlink()]


def cgroups() -> list[Path]:
    """Those that Slurm made for the user's jobs, inner ones first: without processes once `own_processes` is empty."""
    user = own_user()
    tops = FREEZER.glob(f"slurm*/uid_{user.pw_uid}") if user else ()
    return [Path(path) for top in tops for path, _, _ in os.walk(top, topdown=False)]


def remove_link(name: str) -> None:
    if any(link == name for _, link in socket.if_nameindex()):
        subprocess.run(["ip", "link", "delete", name], env={"PATH": SYSTEM_PATH}, capture_output=True, check=False)


def _uid(pid: int) -> int:
    """Whose process it is; -1 when it has ended. The owner of /proc/PID says root of one that may not be dumped."""
    found = re.search(r"^State:\s+([^Z]).*^Uid:\s+(\d+)", text_of(pid, "status"), re.MULTILINE | re.DOTALL)
    return int(found[2]) if found else -1


def text_of(pid: int, name: str) -> str:
    """A file of a process's in /proc; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def main() -> int:
    """Wait until whoever started us is done or dead, then clean up after them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    sweep()
    left = remains()
    print("\n".join(left))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
