"""What an admin writes about a pool is refused at the start, by the key's name, or means what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.core.errors import SettingsError
from edif_hpc.core.pools import Pool, seconds_of
from edif_hpc.core.settings import load

pytestmark = pytest.mark.fast


GPU = 'accelerator = "cuda"\ngpus = 1\n'


def pool(tmp_path: Path, lines: str) -> Pool:
    file = tmp_path / "edif-hpc.toml"
    file.write_text(f'[[pool]]\nname = "main"\n{lines}\n')
    return load(file).settings.pool[0]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('gres = "gpu:a100:1"', "accelerator is cpu"),
        ('options = ["--gpus-per-task=1"]', "accelerator is cpu"),
        ('accelerator = "cuda"', "set gres, gpus or exclusive"),
        ('accelerator = "cuda"\ngres = "gpu:1"\ngpus = 1', "gres and gpus"),
        ('launcher = "local"\npartition = "gpu"', "partition is only for pools whose launcher is slurm"),
        ("min_workers = 2", "min_workers (2) is above max_workers (1)"),
        ('time = "soon"', "no time that Slurm knows"),
        ('time = "1"', "needs 2 minutes at least"),
        ('options = ["--time=5"]', "--time is set by edif-hpc"),
        ('options = ["--requeue"]', "--requeue is set by edif-hpc"),
        ('options = ["nice=5"]', "is not of the form"),
        ('options = ["--comment=`id`"]', "is not of the form"),
        ('setup = ["true\\nfalse"]', "more than one line"),
        ('partition = "a\\nb"', "pool.main.partition"),
        ('memory = "lots"', "pool.main.memory"),
        ("nodes = 2", "pool.main.nodes"),
        ("nodes = 2", "raise max_workers for more allocations"),
        ("nodes = 0", "an allocation holds one worker"),
        ('launcher = "local"\nnodes = 1', "nodes is only for pools whose launcher is slurm"),
        ('options = ["--nodes=2"]', "--nodes is set by edif-hpc"),
        ('options = ["--node=2"]', "--node is set by edif-hpc"),
        ('options = ["--ntasks-per-node=2"]', "--ntasks-per-node is set by edif-hpc"),
        ('memory = "64G"\noptions = ["--mem-per-cpu=2G"]', "contradict each other"),
        ('account = "a b"', "has a space in it"),
        ('qos = "a b"', "has a space in it"),
        ('reservation = "a b"', "has a space in it"),
        ('gres = "gpu: 1"', "has a space in it"),
        ('constraint = " a100"', "without spaces around it"),
        ("gpus = -1", "pool.main.gpus"),
        ("cpus = -1", "pool.main.cpus"),
        ('exclusive = "perhaps"', "pool.main.exclusive"),
        ('mem = "64G"', "memory may be meant"),
        ("models = []", "pool.main.models"),
        ('handover = "sometimes"', "pool.main.handover"),
        ('interconnect = "myrinet"', "pool.main.interconnect"),
        ('interconnect = "slingshot"', "interconnect is slingshot, but accelerator is cpu"),
        ('launcher = "local"\naccelerator = "cuda"\ninterconnect = "none"', "interconnect is only for pools"),
        (GPU + 'adapters = "=mlx5_0:1"', "adapters are InfiniBand's, but interconnect is none"),
        (GPU + 'interconnect = "slingshot"\nadapters = "mlx5"', "but interconnect is slingshot"),
        (GPU + 'interfaces = "ib0"', "interfaces are given, but interconnect is none"),
        (GPU + 'interconnect = "infiniband"\nadapters = "mlx5_0 mlx5_1"', "pool.main.adapters"),
        (GPU + 'interconnect = "ethernet"\ninterfaces = "eth0\\nLD_PRELOAD=x"', "pool.main.interfaces"),
        ('accelerator = "cuda"\ngres = "gpu:0"', "which asks for no GPU"),
        ('accelerator = "cuda"\ngres = "gpu:a100:0"', "which asks for no GPU"),
        ('image = "worker.sif"', "must be a whole path"),
        ('binds = ["scratch"]', "must begin with a whole path"),
        ('launcher = "local"\ntime = "01:00:00"', "time is only for pools whose launcher is slurm"),
        ('launcher = "local"\nproxies = {}', "proxies is only for pools whose launcher is slurm"),
        ('proxies = { https_proxy = "http://ann:secret@proxy:80" }', "which everybody on a node could read"),
        ('proxies = { LD_PRELOAD = "/tmp/x.so" }', "'LD_PRELOAD' is no proxy variable"),
        ('options = ["--get-user-env"]', "--get-user-env is set by edif-hpc"),
        ('options = ["--export-file=/x"]', "--export-file is set by edif-hpc"),
    ],
)
def test_a_contradiction_is_refused_by_its_key(tmp_path: Path, lines: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        pool(tmp_path, lines)
    assert sentence in str(refused.value)
    assert "main" in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_a_word_of_slurms_own_that_nobody_owns_is_passed_on(tmp_path: Path) -> None:
    assert pool(tmp_path, 'nodes = 1\noptions = ["--nodelist=a1", "--mem-per-cpu=2G"]').options[0] == "--nodelist=a1"


@pytest.mark.parametrize("gres", ["mi300a:1", "gpu:mi300x:8", "shard:2"])
def test_a_sites_own_names_for_its_gpus_are_taken(tmp_path: Path, gres: str) -> None:
    assert pool(tmp_path, f'accelerator = "rocm"\ngres = "{gres}"').gres == gres


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ('gres = "gpu"', 1), ('gres = "gpu:2"', 2), ('gres = "gpu:h100:4"', 4), ('gres = "gpu:h100"', 1),
        ("gpus = 3", 3), ('gres = "mi300a:1"', None), ("exclusive = true", None),
    ],
)  # fmt: skip
def test_gpus_are_counted_where_that_can_be_done(tmp_path: Path, lines: str, count: int | None) -> None:
    assert pool(tmp_path, f'accelerator = "cuda"\n{lines}').gpu_count == count


def test_two_pools_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="two pools are named 'main'"):
        pool(tmp_path, '[[pool]]\nname = "main"')


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("30:00", 1800), ("24:00:00", 86400), ("1-12", 129600), ("1-12:30", 131400),
        ("1-12:30:15", 131415),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("", None), ("500", 500 * 1024**2), ("64G", 64 * 1024**3)])
def test_memory_is_read_as_slurm_reads_it(tmp_path: Path, text: str, size: int | None) -> None:
    assert pool(tmp_path, f'memory = "{text}"').memory_bytes == size


def test_models_are_names_or_patterns(tmp_path: Path) -> None:
    found = pool(tmp_path, 'models = ["meta-llama/*", "gpt2"]')
    assert found.serves("meta-llama/Llama-3.1-8B")
    assert found.serves("gpt2")
    assert not found.serves("gpt2-xl")
