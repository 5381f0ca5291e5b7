"""What a cluster's folder holds: configuration, munge's key, devices that stand for GPUs, the user's home."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
import stat
from pathlib import Path

from tests.support.slurm import NODES

CONTROLLER_PORT, NODE_PORT = 16817, 16818
"""On addresses that are the cluster's alone."""
NULL = stat.S_IFCHR | 0o666
"""Twins of /dev/null: Slurm wants a device file for each GPU, and no two alike."""

SLURM_CONF = """\
ClusterName=testbed
SlurmctldHost={login}({internal})
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
# Slurm keeps an ended job's credential for so long, and launches nothing for a requeued one before.
AuthInfo=socket={folder}/munge/socket,cred_expire=20
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
# The nodes claim more cores and memory than this machine has: many small allocations fit, and it is for nothing else.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
GresTypes=gpu
KillWait=5
MinJobAge=120
SlurmdTimeout=20
NodeName=DEFAULT CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:a100:2
NodeName=node1 NodeHostname=node1 NodeAddr={node1} Port={node_port}
NodeName=node2 NodeHostname=node2 NodeAddr={node2} Port={node_port}
PartitionName=gpu Nodes=node[1-2] Default=YES MaxTime=120 DefaultTime=5 PriorityTier=10 PreemptMode=OFF
PartitionName=single Nodes=node2 MaxNodes=1 MaxTime=30 DefaultTime=5 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=node[1-2] MaxTime=120 DefaultTime=5 PriorityTier=1 PreemptMode=CANCEL GraceTime=10
PartitionName=members Nodes=node1 AllowGroups=root MaxTime=30 DefaultTime=5 PriorityTier=10 PreemptMode=OFF
"""

FREEZER = Path("/sys/fs/cgroup/freezer")
CGROUP_CONF = f"""\
CgroupPlugin=cgroup/v1
CgroupMountpoint={FREEZER.parent}
CgroupAutomount=no
"""

NODE_SCRIPT = """\
# The first process of a node: takes in orphans, and the node is off when it ends.
set -eu
name=$1 address=$2 folder=$3
mount --bind "$folder/hosts" /etc/hosts
hostname "$name"
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done  # it is put in from outside
ip address add "$address" dev eth0
ip link set eth0 up
slurmd -D -N "$name" -f "$folder/slurm.conf" &
wait "$!"
"""


def proctrack() -> str:
    """How processes of a step are told from others: as clusters do it, where this machine has what that takes.

    It decides whom a signal reaches: by cgroup those alone that Slurm started, else all that they started, and so what
    mounts their images; without its mount whoever runs from an image dies of bus errors.
    """
    return "proctrack/cgroup" if FREEZER.is_dir() else "proctrack/linuxproc"


def write_files(folder: Path, user: pwd.struct_passwd, internal: str, nodes: list[str]) -> None:
    """The folder with configuration, key, devices and the user's home."""
    for name in ("log", "state", "munge"):
        (folder / name).mkdir(mode=0o755)
    home = folder / "home"
    home.mkdir(mode=0o700)
    os.chown(home, user.pw_uid, user.pw_gid)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    login = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(
            login=login, internal=internal, folder=folder, node1=nodes[0], node2=nodes[1],
            controller_port=CONTROLLER_PORT, node_port=NODE_PORT, proctrack=proctrack(),
        )
    )  # fmt: skip
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    lines = []
    for node in NODES:
        devices = folder / "devices" / node
        devices.mkdir(parents=True)
        for number in (0, 1):
            os.mknod(devices / f"gpu{number}", NULL, os.makedev(1, 3))
        lines.append(f"NodeName={node} Name=gpu Type=a100 File={devices}/gpu[0-1]\n")
    (folder / "gres.conf").write_text("".join(lines))
    known = zip((internal, *nodes), (login, *NODES), strict=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in known))
    (folder / "node.sh").write_text(NODE_SCRIPT)
