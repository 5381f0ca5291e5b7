"""What a machine has: captured outputs, cgroups of both versions, visibility, and tools that fail.

Where the captured outputs come from stands beside them. A fake tool is an executable on PATH that prints one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edif_hpc.core.errors import SettingsError
from edif_hpc.hardware import detect as detecting
from edif_hpc.hardware import host
from edif_hpc.hardware.detect import detect
from edif_hpc.hardware.memory import MIB
from edif_hpc.hardware.partitions import Modes, shared_out
from edif_hpc.hardware.profiles import PROFILES, Device
from edif_hpc.hardware.smi import Report, parse_amd, parse_amd_partitions, parse_nvidia, parse_rocm
from edif_hpc.hardware.visibility import visible

pytestmark = pytest.mark.fast

CAPTURED = Path(__file__).parent / "captured"


def captured(name: str) -> str:
    return (CAPTURED / name).read_text()


# -- parsing ----------------------------------------------------------------------------------------------------------


def test_an_nvidia_gpu() -> None:
    report = parse_nvidia(captured("nvidia-rtx-pro-6000.xml"))
    name = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    assert report.devices == (Device(0, name, (97887 - 637) * MIB, "GPU-12345678-aaaa-bbbb-cccc-0123456789ab"),)
    assert (report.driver, report.runtime) == ("590.44.01", "13.1")


def test_a_gpu_in_mig_mode_is_its_slices() -> None:
    report = parse_nvidia(captured("nvidia-a100-mig.xml"))
    assert [(device.index, device.memory_bytes, device.slice) for device in report.devices] == [
        (0, 19968 * MIB, True),
        (1, 19968 * MIB, True),
    ]


def test_amd_gpus() -> None:
    report = parse_rocm(captured("rocm-mi100-602.json"))
    name = "Arcturus GL-XL [Instinct MI100]"
    assert report.devices == (
        Device(0, name, 34342961152, "0x79ccd55167a2124a"),
        Device(1, name, 34342961152, "0x4edfb117a17a07d"),
    )
    assert report.driver == "6.3.6"


def test_an_amd_gpu_without_a_name() -> None:
    assert parse_rocm(captured("rocm-rx6700xt-430.json")).devices == (Device(0, "AMD GPU", 12868124672),)


def test_amd_gpus_without_rocm_smi() -> None:
    report = parse_amd(captured("amdsmi-static-mi355x.json"))
    assert report.devices == (
        Device(0, "AMD Instinct MI355X", 294896 * MIB, "0xC62AC130EE448403"),
        Device(1, "AMD Instinct MI355X", 294896 * MIB, "0xF32CB37CEEF6FEB5"),
    )
    assert report.driver == "6.14.14"


def test_partition_modes_of_amd_gpus() -> None:
    text = captured("amdsmi-partition-mi355x.json")
    assert parse_amd_partitions(text) == Modes(("SPX",), ("NPS1",))
    # AMD's change log of amd-smi: text followed the JSON in several releases.
    assert parse_amd_partitions(f"{text}\n\nLegend:\n  * = Current mode\n") == Modes(("SPX",), ("NPS1",))


@pytest.mark.parametrize("text", ["", "N/A", "[]", '{"current_partition": 1}', '{"current_partition": [1, {}]}'])
def test_what_is_no_partition_report_names_no_mode(text: str) -> None:
    assert parse_amd_partitions(text) == Modes()


# -- partitioned GPUs: the figures are those of the reports that the module names ------------------------------------

MI300X = 206141652992
"""Bytes that rocm-smi showed for a whole MI300X, and for each of its eight parts."""


@pytest.mark.parametrize(
    ("name", "shown", "modes", "usable"),
    [
        ("AMD Instinct MI300X", MI300X, Modes(("SPX",), ("NPS1",)), MI300X),
        ("AMD Instinct MI300X", MI300X, Modes(("CPX",), ("NPS1",)), MI300X // 8),
        ("AMD Instinct MI300X", MI300X, Modes(("CPX",), ("NPS4",)), MI300X // 8),
        ("AMD Instinct MI300X", 98296 * MIB, Modes(("DPX",), ("NPS1",)), 98296 * MIB),  # amd-smi of ROCm 7.0.2: a share
        ("AMD Instinct MI300A", 42.66 * 1024 * MIB, Modes(("TPX",)), 42.66 * 1024 * MIB),  # of ROCm 6.2.4, likewise
        ("AMD Instinct MI300A", 128 * 1024 * MIB, Modes(("CPX",)), 128 * 1024 * MIB // 6),
        ("AMD GPU", MI300X, Modes(("CPX", "SPX")), MI300X // 8),
        ("Arcturus GL-XL [Instinct MI100]", 34342961152, Modes(), 34342961152),
    ],
)
def test_a_part_of_a_gpu_has_its_share_of_the_memory(name: str, shown: float, modes: Modes, usable: float) -> None:
    (device,) = shared_out((Device(0, name, int(shown)),), modes)
    assert device.memory_bytes == int(usable)


def test_a_warning_before_the_json() -> None:
    # The line is quoted from a public parser's tests, which say that it came from a Strix Halo machine.
    warning = "WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status\n\n"
    text = captured("rocm-mi100-602.json")
    assert parse_rocm(warning + text) == parse_rocm(text)


@pytest.mark.parametrize("parse", [parse_nvidia, parse_rocm, parse_amd])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found",
        "{",
        "[]",
        "{}",
        "[1]",
        '{"card0": 1}',
        '{"gpu_data": [{"gpu": 0}]}',
        "<gpu/>",
        "[" * 9999,
    ],
)
def test_what_is_no_report_has_no_devices(parse, text: str) -> None:
    assert parse(text) == Report()


# -- visibility -------------------------------------------------------------------------------------------------------

GPUS = tuple(Device(index, "GPU", 80 * MIB, f"GPU-{index}{index}-aa") for index in range(4))


@pytest.mark.parametrize(
    ("value", "left"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("all", [0, 1, 2, 3]),
        ("2", [2]),
        ("3,0", [3, 0]),
        (" 1 , 2 ", [1, 2]),
        ("1,9,2", [1]),
        ("GPU-22", [2]),
        ("GPU-99", []),
    ],
)
def test_what_cuda_visible_devices_leaves(value: str | None, left: list[int]) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [device.index for device in visible(PROFILES["cuda"], GPUS, environment)] == left


def test_a_slice_by_its_uuid_is_some_slice() -> None:
    slices = parse_nvidia(captured("nvidia-a100-mig.xml")).devices
    assert visible(PROFILES["cuda"], slices, {"CUDA_VISIBLE_DEVICES": "MIG-1234"}) == slices[:1]
    assert visible(PROFILES["cuda"], GPUS, {"CUDA_VISIBLE_DEVICES": "MIG-1234"}) == ()


@pytest.mark.parametrize(
    "environment",
    [
        {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "2,3"},
        {"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0"},
        {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"},
        {"ROCR_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "0"},
    ],
)
def test_contradictions_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        visible(PROFILES["rocm"], GPUS, environment)
    first, *others = environment
    assert str(caught.value).endswith(f"keep {first} and unset {' and '.join(others)}.")


def test_two_that_change_nothing_are_no_contradiction() -> None:
    both = {"ROCR_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}  # as Slurm sets them without AutoDetect
    assert len(visible(PROFILES["rocm"], GPUS, both)) == 2


def test_what_hip_does_not_read_is_no_contradiction() -> None:
    slurms = {"ROCR_VISIBLE_DEVICES": "2,3", "GPU_DEVICE_ORDINAL": "2,3"}
    assert [device.index for device in visible(PROFILES["rocm"], GPUS, slurms)] == [2, 3]


def test_on_nvidia_only_cuda_counts() -> None:
    both = {"ROCR_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert [device.index for device in visible(PROFILES["cuda"], GPUS, both)] == [2, 3]


# -- memory and cores -------------------------------------------------------------------------------------------------


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16000000 kB\nMemFree:         1000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16000000 * 1024),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}, 16000000 * 1024),
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": "1000000\n"}, 1000000),
        ({"proc/self/cgroup": "0::/not/here\n", "sys/fs/cgroup/memory.max": "2000000\n"}, 2000000),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n3:memory:/slurm/uid_1/job_2\n0::/\n",
                "sys/fs/cgroup/memory/slurm/uid_1/job_2/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/slurm/uid_1/memory.limit_in_bytes": "3000000\n",
            },
            3000000,
        ),
        ({"proc/self/cgroup": "nonsense\n"}, 16000000 * 1024),
    ],
)
def test_memory_under_cgroups_of_both_versions(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert host.memory_bytes(put(tmp_path, {**MEMINFO, **files})) == expected


def test_this_machine() -> None:
    found = detect()
    assert 0 < found.host_memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.cores == len(os.sched_getaffinity(0))


# -- running the tools ------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def tool(tools: Path, name: str, script: str) -> None:
    path = tools / name
    path.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    path.chmod(0o755)


def look(tools: Path, root: Path, **environment: str):
    return detect({"PATH": f"{tools}:/usr/bin:/bin", **environment}, put(root / "root", MEMINFO))


def test_a_cuda_machine(tools: Path, tmp_path: Path) -> None:
    tool(tools, "nvidia-smi", f'[ "$*" = "-q -x" ] && cat {CAPTURED}/nvidia-rtx-pro-6000.xml')
    found = look(tools, tmp_path)
    assert (found.profile.name, found.profile.torch_device, found.runtime) == ("cuda", "cuda", "13.1")
    assert found.model_memory_bytes == (97887 - 637) * MIB
    assert found.notes == ()


def test_a_rocm_machine(tools: Path, tmp_path: Path) -> None:
    tool(tools, "rocm-smi", f"cat {CAPTURED}/rocm-mi100-602.json")
    modes = {f"root/sys/class/drm/card{n}/device/current_compute_partition": "SPX\n" for n in (0, 1)}
    put(tmp_path, {**modes, "root/opt/rocm/.info/version": "6.0.2-115\n"})
    found = look(tools, tmp_path, ROCR_VISIBLE_DEVICES="1")
    assert (found.profile.name, found.profile.torch_device) == ("rocm", "cuda")
    assert [device.index for device in found.devices] == [1]
    assert (found.driver, found.runtime, found.partitions) == ("6.3.6", "6.0.2-115", ("SPX",))
    assert (found.devices[0].memory_bytes, found.notes) == (34342961152, ())


def test_a_machine_with_amd_smi_alone(tools: Path, tmp_path: Path) -> None:
    tool(tools, "amd-smi", f'cat "{CAPTURED}/amdsmi-$1-mi355x.json"')
    found = look(tools, tmp_path)
    assert (found.profile.name, len(found.devices), found.driver) == ("rocm", 2, "6.14.14")
    assert (found.partitions, found.memory_partitions, found.notes) == (("SPX",), ("NPS1",), ())


def test_partitioned_gpus_are_noted_and_count_with_their_share(tools: Path, tmp_path: Path) -> None:
    tool(tools, "amd-smi", f'cat "{CAPTURED}/amdsmi-$1-mi355x.json"')
    device = "root/sys/class/drm/card1/device"
    put(tmp_path, {f"{device}/current_compute_partition": "CPX\n", f"{device}/current_memory_partition": "NPS1\n"})
    found = look(tools, tmp_path)
    assert (found.partitions, found.memory_partitions) == (("CPX",), ("NPS1",))  # the driver's word comes first
    assert found.model_memory_bytes == 294896 * MIB // 8
    assert "(CPX, NPS1)" in found.notes[0]
    assert "one of 8 parts of a GPU and has 36.0 GiB" in found.notes[0]


def test_of_several_mig_slices_a_worker_has_the_first(tools: Path, tmp_path: Path) -> None:
    tool(tools, "nvidia-smi", f"cat {CAPTURED}/nvidia-a100-mig.xml")
    found = look(tools, tmp_path)
    assert [device.index for device in found.devices] == [0]
    assert "2 MIG slices" in found.notes[0]


def test_no_tools_is_a_cpu(tools: Path, tmp_path: Path) -> None:
    found = detect(
        {"PATH": str(tools), "CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "1"}, put(tmp_path, MEMINFO)
    )
    assert (found.profile.name, found.devices, found.notes) == ("cpu", (), ())
    assert found.model_memory_bytes == found.host_memory_bytes == 16000000 * 1024


def test_a_tool_that_fails_is_a_note(tools: Path, tmp_path: Path) -> None:
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    tool(tools, "nvidia-smi", f'echo "{said}"; exit 9')
    found = look(tools, tmp_path)
    assert found.profile.name == "cpu"
    assert found.notes == (f"nvidia-smi failed: {said}",)


def test_a_tool_that_hangs_is_a_note(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detecting, "TOOL_SECONDS", 0.2)
    tool(tools, "rocm-smi", "exec sleep 60")
    found = look(tools, tmp_path)
    assert found.profile.name == "cpu"
    assert "rocm-smi did not answer" in found.notes[0]


def test_hidden_gpus_make_a_cpu_and_a_note(tools: Path, tmp_path: Path) -> None:
    tool(tools, "nvidia-smi", f"cat {CAPTURED}/nvidia-rtx-pro-6000.xml")
    found = look(tools, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert found.profile.name == "cpu"
    assert found.notes == ("CUDA_VISIBLE_DEVICES= hides all 1 devices of this machine, so it counts as a CPU.",)
