"""What `slurm/sites` holds is what the program takes: an admin fills in names, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.core.settings import load
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.script import script
from tests.support.models import REPO

pytestmark = pytest.mark.fast

SITES = sorted((REPO / "slurm" / "sites").glob("*.toml"))
HOME = Path("/home/ann/.edif-hpc")


@pytest.mark.parametrize("file", SITES, ids=lambda file: file.stem)
def test_a_site_is_read_and_its_pools_become_scripts(file: Path) -> None:
    pools = load(file, must_exist=True).settings.pool
    assert pools
    for pool in pools:
        text = script(pool, names.first(HOME, pool.name), order.folder(HOME))
        assert f"#SBATCH --time={pool.time}\n" in text


@pytest.mark.parametrize("file", SITES, ids=lambda file: file.stem)
def test_a_site_says_what_was_checked_and_what_was_not(file: Path) -> None:
    text = file.read_text()
    assert "# Checked:" in text
    assert "# Not checked:" in text
