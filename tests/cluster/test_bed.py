"""The cluster that other tests stand on is what they take it for: a real Slurm, with nodes apart from this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.slurm import CLUSTER, NODE_LOST_SECONDS, NODES, Cluster

from . import bed

pytestmark = CLUSTER


def test_two_nodes_are_idle(cluster: Cluster) -> None:
    assert cluster.node_states() == {"node1": "idle", "node2": "idle"}
    assert cluster.jobs() == []


def test_a_job_is_the_users_on_a_node_with_the_gpus_it_asked_for(cluster: Cluster) -> None:
    step = 'echo "step $(hostname) $CUDA_VISIBLE_DEVICES"; sleep 60'
    script = f"""echo "$(hostname) $(id -u) $HOME"; srun bash -c '{step}'"""
    first, second = (cluster.submit(script, "--nodelist=node1", "--gres=gpu:1") for _ in range(2))
    third = cluster.submit(script, "--gres=gpu:a100:2")
    for job_id in (first, second, third):
        cluster.wait(lambda job_id=job_id: "step" in cluster.output(job_id), what="a step's output")  # type: ignore[misc]
    mine = f"{cluster.uid} {cluster.home}"
    assert cluster.output(first).splitlines() == [f"node1 {mine}", "step node1 0"]
    assert cluster.output(second).splitlines() == [f"node1 {mine}", "step node1 1"]
    assert cluster.output(third).splitlines() == [f"node2 {mine}", "step node2 0,1"]
    assert cluster.uid != 0


def test_a_step_spans_both_nodes(cluster: Cluster) -> None:
    job_id = cluster.submit("srun --label hostname | sort; echo done", "--nodes=2", "--ntasks-per-node=1")
    cluster.wait(lambda: "done" in cluster.output(job_id), what="the output of both")
    assert cluster.output(job_id).splitlines() == ["0: node1", "1: node2", "done"]


@contextmanager
def listening(address: str) -> Iterator[int]:
    with socket.create_server((address, 0)) as server:
        yield server.getsockname()[1]


def test_from_a_node_the_login_sides_loopback_is_out_of_reach_and_its_internal_address_is_not(cluster: Cluster) -> None:
    with listening("127.0.0.1") as loopback, listening(cluster.internal_address) as internal:
        places = f"127.0.0.1/{loopback} {cluster.internal_address}/{internal} {socket.gethostname()}/{internal}"
        connect = '(timeout 5 bash -c "</dev/tcp/$place") 2>/dev/null && echo $place'
        job_id = cluster.submit(f"for place in {places}; do {connect}; done; echo done")
        cluster.wait(lambda: "done" in cluster.output(job_id), what="the end of three tries to connect")
    reached = cluster.output(job_id).split()
    assert reached == [f"{cluster.internal_address}/{internal}", f"{socket.gethostname()}/{internal}", "done"]


def test_a_node_sees_its_own_processes_and_no_way_out(cluster: Cluster) -> None:
    job_id = cluster.submit("ip -4 route; ls -d /proc/[0-9]* | wc -l; ps -o args= -p 1; echo done")
    cluster.wait(lambda: "done" in cluster.output(job_id), what="a look around")
    *routes, count, first, _ = cluster.output(job_id).splitlines()
    assert len(routes) == 1
    assert "default" not in routes[0]
    assert int(count) < 30
    assert "node.sh" in first


@pytest.mark.long
def test_usr2_comes_to_a_step_ahead_of_the_limit(cluster: Cluster) -> None:
    """Slurm alone: its signal comes to a step ahead of the limit."""
    # Slurm looks every 30 s at most and lets the signal come up to a minute early: only "before the end" is certain.
    step = "trap 'echo got USR2; exit 0' USR2; echo ready; while true; do sleep 0.2; done"
    job_id = cluster.submit(f'srun bash -c "{step}"; echo after', "--time=1", "--signal=USR2@30")
    cluster.wait(lambda: "after" in cluster.output(job_id), 75.0, "the signal")
    lines = cluster.output(job_id).splitlines()  # bash also mentions its own child, which the signal ended
    assert (lines[0], lines[-1]) == ("ready", "after")
    assert "got USR2" in lines
    assert cluster.wait_ended(job_id)["JobState"] == "COMPLETED"


def test_a_singleton_waits_for_its_namesake(cluster: Cluster) -> None:
    first = cluster.submit("sleep 300", "--job-name=lineage-1")
    second = cluster.submit("sleep 300", "--job-name=lineage-1", "--dependency=singleton")
    other = cluster.submit("sleep 300", "--job-name=lineage-2", "--dependency=singleton")
    cluster.wait_running(first)
    cluster.wait_running(other)
    held = cluster.job(second)
    assert held is not None
    assert (held.state, held.reason) == ("PENDING", "Dependency")
    cluster.run(["scancel", first])
    cluster.wait_running(second)


def test_afterany_starts_when_the_other_ends_however_it_ends(cluster: Cluster) -> None:
    first = cluster.submit("sleep 300")
    second = cluster.submit("sleep 300", f"--dependency=afterany:{first}")
    cluster.wait_running(first)
    held = cluster.job(second)
    assert held is not None
    assert held.state == "PENDING"
    cluster.run(["scancel", first])
    cluster.wait_running(second)


@pytest.mark.long
def test_a_preempted_job_gets_its_grace(cluster: Cluster) -> None:
    """Slurm alone: a preempted job gets its grace."""
    polite = cluster.submit(
        "trap 'echo told; exit 0' TERM; echo ready; while true; do sleep 0.2; done",
        "--partition=scavenge", "--gres=gpu:2", "--nodelist=node2", "--no-requeue",
    )  # fmt: skip
    cluster.wait(lambda: "ready" in cluster.output(polite), what="the job that will have to go")
    urgent = cluster.submit("sleep 300", "--gres=gpu:2", "--nodelist=node2")
    cluster.wait_running(urgent, 60.0)
    assert cluster.details(polite)["JobState"] in {"PREEMPTED", "CANCELLED"}


def test_a_paused_controller_says_nothing_and_forgets_nothing(cluster: Cluster) -> None:
    job_id = cluster.submit("sleep 300")
    cluster.wait_running(job_id)
    with cluster.paused_controller(), pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["squeue"], timeout=2)
    cluster.wait_running(job_id)


@pytest.mark.long
def test_a_controller_that_was_killed_finds_its_jobs_again(cluster: Cluster) -> None:
    """Slurm alone: a controller that was killed finds its jobs again."""
    job_id = cluster.submit("sleep 300")
    cluster.wait_running(job_id)
    running = time.time()
    state = cluster.folder / "state" / "job_state"  # written some seconds later; what was not is lost with it
    cluster.wait(lambda: state.exists() and state.stat().st_mtime > running, what="the job's state on disk")
    cluster.stop("slurmctld")
    cluster.start("slurmctld")
    cluster.wait(lambda: cluster.admin("scontrol", "ping", check=False).returncode == 0, what="slurmctld answering")
    cluster.wait_running(job_id)


@pytest.mark.long
def test_a_node_that_is_switched_off_takes_its_job_with_it(cluster: Cluster) -> None:
    """Slurm alone: a node that is switched off takes its job with it."""
    job_id = cluster.submit("sleep 300", "--nodelist=node1", "--no-requeue")
    cluster.wait_running(job_id)
    cluster.wait(
        lambda: any("sleep" in bed.text_of(pid, "cmdline") for pid in cluster.pids_on("node1")), what="a sleep"
    )
    cluster.stop("node1")
    cluster.wait(lambda: cluster.job(job_id) is None, NODE_LOST_SECONDS, "Slurm noticing")
    assert cluster.details(job_id)["JobState"] == "NODE_FAIL"
    assert cluster.node_states() == {"node1": "down*", "node2": "idle"}


def test_a_machines_own_slurm_is_not_touched(cluster: Cluster) -> None:
    files = {path for pid in bed.own_processes() for path in open_files(pid)}
    assert any(path.startswith(str(cluster.folder)) for path in files)
    assert not [path for path in files if path.startswith(("/etc/", "/var/", "/run/", "/home/"))]


def open_files(pid: int) -> set[str]:
    try:
        return {os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    except OSError:
        return set()  # ended meanwhile


def test_restoring_mends_what_a_test_broke(slurm: Cluster) -> None:
    slurm.restore()
    slurm.submit("sleep 300", "--nodelist=node1")
    slurm.set_node("node2", "drain")
    assert slurm.node_states()["node2"] != "idle"
    slurm.restore()
    assert slurm.node_states() == dict.fromkeys(NODES, "idle")
