"""The script an admin sees is the script that is submitted, and the command in it is the one that runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import SlurmSettings
from edif_hpc.fleet.slurm import container
from edif_hpc.fleet.slurm.names import Name
from edif_hpc.fleet.slurm.order import Order
from edif_hpc.fleet.slurm.script import script

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parent / "golden"
NAME = Name("3f2a91", "helma", "7c0d12", 4)
FOLDER = Path("/home/ann/.edif-hpc/allocations")
HELMA = Pool(
    name="helma", accelerator="cuda", image="/home/ann/images/worker-cuda.sif", partition="h100", account="b101aa",
    gres="gpu:h100:1", cpus=16, memory="120G", time="23:59:00", options=["--nice=100", "--mail-type=NONE"],
    setup=["module load apptainer"], proxies={"https_proxy": "http://proxy:80", "no_proxy": ".fau.de"},
    binds=["/anvme:/anvme:ro"],
)  # fmt: skip
LUMI = Pool(
    name="lumi", accelerator="rocm", image="/scratch/project_1/worker-rocm.sif", partition="small-g", qos="normal",
    account="project_1", gpus=2, cpus=14, memory="120G", time="1-00:00:00", reservation="course", constraint="mi250x",
    interconnect="slingshot",
)  # fmt: skip
BARE = Pool(name="cpu", time="2-00:00:00", exclusive=True)
STEP = {
    "PATH": "/usr/bin", "HOME": "/home/ann", "SLURM_JOB_ID": "77", "CUDA_VISIBLE_DEVICES": "0",
    "ROCR_VISIBLE_DEVICES": "1", "HF_TOKEN": "secret", "AWS_SECRET_ACCESS_KEY": "secret",
}  # fmt: skip


def order(pool: Pool) -> Order:
    return Order(
        home=Path("/home/ann/.edif-hpc"), pool=pool, slurm=SlurmSettings(), home_tag="3f2a91", lineage="7c0d12",
        generation=4, cache=Path("/anvme/ann/hub"), reached_at="login1.internal",
    )  # fmt: skip


@pytest.mark.parametrize("pool", [HELMA, LUMI, BARE], ids=lambda pool: pool.name)
def test_the_script_is_as_it_was_agreed(pool: Pool) -> None:
    text = script(pool, Name("3f2a91", pool.name, "7c0d12", 4), FOLDER, dependency="singleton")
    assert text.replace(sys.executable, "python") == (GOLDEN / f"{pool.name}.sbatch").read_text()


def test_slurm_is_never_asked_to_requeue() -> None:
    assert "#SBATCH --no-requeue\n" in script(BARE, NAME, FOLDER)


def test_the_container_sees_what_it_needs_and_no_secret() -> None:
    command = container.command(order(HELMA), Path("/scratch/77"), 1_800_000_000.4, STEP)
    text = " ".join(command)
    assert command[:2] == ["apptainer", "exec"]
    assert "--containall" in command
    assert "--cleanenv" in command
    assert "--nv" in command
    assert "--bind /scratch/77:/tmp" in text
    assert "--bind /anvme/ann/hub:/anvme/ann/hub:ro" in text
    assert "--env=CUDA_VISIBLE_DEVICES=0" in command
    assert not any("ROCR" in part or "secret" in part for part in command)
    assert text.endswith(
        "/home/ann/images/worker-cuda.sif edif-hpc worker --home /home/ann/.edif-hpc --id worker-helma-7c0d12-g4 "
        "--pool helma --deadline 1800000000 --lineage 7c0d12 --generation 4 --supervisor /tmp/supervisor "
        "--handover overlap"
    )


def test_what_nccl_is_told_goes_into_the_container_and_nothing_else_does() -> None:
    step = {**STEP, "NCCL_NET_GDR_LEVEL": "PHB", "FI_PROVIDER": "cxi", "NCCL_IB_HCA": "mlx5_9"}
    fabric = {"interconnect": "infiniband", "adapters": "=mlx5_0:1,mlx5_3:1", "interfaces": "ib0"}
    told = HELMA.model_copy(update=fabric)
    for_network = ("NCCL", "FI_")
    command = container.command(order(told), Path("/scratch/77"), 0.0, step)
    assert [part for part in command if part.startswith(tuple(f"--env={name}" for name in for_network))] == [
        "--env=NCCL_IB_HCA==mlx5_0:1,mlx5_3:1",
        "--env=NCCL_SOCKET_IFNAME=ib0",
    ]
    bare = container.bare_environment(order(told.model_copy(update={"image": ""})), Path("/scratch/77"), step)
    assert bare["NCCL_IB_HCA"] == "=mlx5_0:1,mlx5_3:1"
    assert not any(name.startswith(for_network) for name in container.bare_environment(order(HELMA), Path("/"), step))


def test_of_variables_that_hide_devices_the_first_alone_goes_in() -> None:
    """Slurm sets both on AMD without AutoDetect, and each counts only what the one before left over."""
    command = container.command(order(LUMI), Path("/scratch/77"), 0.0, {**STEP, "HIP_VISIBLE_DEVICES": "1"})
    assert [part for part in command if "VISIBLE" in part] == ["--env=ROCR_VISIBLE_DEVICES=1"]


def test_redis_and_the_store_are_reached_past_every_proxy() -> None:
    found = container.proxies(order(HELMA))
    assert found["no_proxy"] == found["NO_PROXY"] == ".fau.de,localhost,127.0.0.1,login1.internal"
    assert found["HTTPS_PROXY"] == "http://proxy:80"
    assert container.proxies(order(BARE)) == {}


def test_without_an_image_the_environment_is_named_too() -> None:
    found = container.bare_environment(order(BARE), Path("/scratch/77"), STEP)
    assert found["PATH"] == "/usr/bin"
    assert found["TMPDIR"] == "/scratch/77"
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "CUDA_VISIBLE_DEVICES"} & set(found)
