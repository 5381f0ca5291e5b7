"""What NCCL and RCCL are told: an answer for every fabric, none that makes jobs hang, and READMEs that say the same."""

from __future__ import annotations

from typing import get_args

import pytest

from edif_hpc.core.pools import Pool
from edif_hpc.hardware.interconnect import FABRICS, variables
from tests.support.models import REPO

pytestmark = pytest.mark.fast

KNOWN = get_args(Pool.model_fields["interconnect"].annotation)
GPUS = ("cuda", "rocm")


def pool(accelerator: str = "cuda", **keys: str) -> Pool:
    return Pool.model_validate({"name": "main", "accelerator": accelerator, "gpus": 1, **keys})


def test_every_fabric_is_known_for_both_accelerators() -> None:
    assert set(FABRICS) == {(fabric, accelerator) for fabric in KNOWN for accelerator in GPUS}


@pytest.mark.parametrize("fabric", KNOWN)
@pytest.mark.parametrize("accelerator", GPUS)
def test_a_fabric_says_nothing_that_belongs_to_another(fabric: str, accelerator: str) -> None:
    names = set(variables(pool(accelerator, interconnect=fabric)))
    assert not names & {"NCCL_NET_GDR_LEVEL", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_P2P_DISABLE"}
    assert any(name.startswith("FI_") for name in names) == (fabric == "slingshot")
    assert ("NCCL_IB_DISABLE" in names) == (fabric == "ethernet")
    assert all(name.startswith(("NCCL_", "FI_")) for name in names)


def test_a_cpu_pool_is_told_nothing() -> None:
    assert variables(Pool(name="main")) == {}


def test_what_a_site_names_takes_the_place_of_what_stands_here() -> None:
    assert variables(pool("rocm", interconnect="slingshot"))["NCCL_SOCKET_IFNAME"] == "hsn0,hsn1,hsn2,hsn3"
    assert variables(pool("rocm", interconnect="slingshot", interfaces="hsn0"))["NCCL_SOCKET_IFNAME"] == "hsn0"
    ours = variables(pool(interconnect="infiniband", adapters="=mlx5_0:1,mlx5_3:1"))
    assert ours == {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_3:1"}
    variables(pool(interconnect="slingshot", interfaces="hsn7"))
    assert variables(pool(interconnect="slingshot"))["NCCL_SOCKET_IFNAME"] == "hsn"  # the data stays as it is


@pytest.mark.parametrize("accelerator", GPUS)
def test_the_readme_has_this_table(accelerator: str) -> None:
    text = (REPO / accelerator / "README.md").read_text()
    for (fabric, kind), told in FABRICS.items():
        if kind == accelerator:
            shown = " ".join(f"`{name}={value}`" for name, value in told.items()) or "none"
            assert f"| `{fabric}` | {shown} |\n" in text
