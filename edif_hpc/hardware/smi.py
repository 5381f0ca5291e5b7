"""Reading what nvidia-smi, rocm-smi and amd-smi print. Nothing here runs them, so all of it is tested on captured text.

`nvidia-smi -q -x` is XML with a versioned schema; rocm-smi prints JSON whose key names drift between releases in their
capitals; amd-smi nests more and wraps its list from ROCm 7 on. What cannot be read is left out, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from edif_hpc.hardware.partitions import Modes
from edif_hpc.hardware.profiles import Device

UNITS = {"B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}
"""Both vendors' tools mean powers of two, also where they write MB."""


@dataclass(frozen=True)
class Report:
    """What one tool told."""

    devices: tuple[Device, ...] = ()
    driver: str = ""
    runtime: str = ""


def parse_nvidia(text: str) -> Report:
    """Read `nvidia-smi -q -x`. A GPU in MIG mode is replaced by its slices: only those can be used."""
    try:
        # The text comes from the driver's own tool on this machine, and external entities are not fetched.
        root = ElementTree.fromstring(text)  # noqa: S314 - see above
    except ElementTree.ParseError:
        return Report()
    devices: list[Device] = []
    for gpu in root.iter("gpu"):
        name, uuid = gpu.findtext("product_name", "NVIDIA GPU").strip(), gpu.findtext("uuid", "").strip()
        slices = gpu.findall("mig_devices/mig_device") if _mig(gpu) else []
        for part in slices or [gpu]:
            memory = part.find("fb_memory_usage")
            if memory is None:
                continue
            usable = _size(memory.findtext("total", "")) - _size(memory.findtext("reserved", ""))
            devices.append(Device(len(devices), name, usable, uuid, slice=part is not gpu))
    return Report(
        tuple(devices), root.findtext("driver_version", "").strip(), root.findtext("cuda_version", "").strip()
    )


def _mig(gpu: ElementTree.Element) -> bool:
    return gpu.findtext("mig_mode/current_mig", "").strip() == "Enabled"


def parse_rocm(text: str) -> Report:
    """Read `rocm-smi --showproductname --showmeminfo vram --showuniqueid --showdriverversion --json`."""
    data = _json_after_warnings(text)
    if not isinstance(data, dict):
        return Report()
    cards = {key.casefold(): value for key, value in data.items() if isinstance(value, dict)}
    devices = tuple(_rocm_devices(cards))
    return Report(devices, _get(cards.get("system", {}), "driver version"))


def _rocm_devices(cards: dict[str, dict[str, Any]]) -> Iterator[Device]:
    for number, card in sorted((int(key[4:]), card) for key, card in cards.items() if re.fullmatch(r"card\d+", key)):
        memory = _get(card, "vram total memory (b)")
        names = [_get(card, key) for key in ("card series", "device name", "card model")]
        # Where the PCI database is missing, rocm-smi prints a vendor id in the place of each name.
        name = next((name for name in names if name and not name.startswith("0x")), "AMD GPU")
        if memory.isdigit():
            yield Device(number, name, int(memory), _get(card, "unique id"))


def parse_amd(text: str) -> Report:
    """Read `amd-smi static --asic --vram --driver --json`, for machines that have no rocm-smi any more."""
    data = _json_after_warnings(text)
    listed = data.get("gpu_data") if isinstance(data, dict) else data
    devices, driver = [], ""
    for gpu in listed if isinstance(listed, list) else []:
        if not isinstance(gpu, dict) or not isinstance(gpu.get("gpu"), int):
            continue
        size = _dig(gpu, "vram", "size")
        memory = _size(f"{_dig(size, 'value')} {_dig(size, 'unit')}")
        driver = driver or _text(_dig(gpu, "driver", "version"))
        name, uuid = _text(_dig(gpu, "asic", "market_name")), _text(_dig(gpu, "asic", "asic_serial"))
        if memory:
            devices.append(Device(gpu["gpu"], name or "AMD GPU", memory, uuid))
    return Report(tuple(devices), driver)


def parse_amd_partitions(text: str) -> Modes:
    """Read `amd-smi partition --json`; in some releases text follows the JSON.

    Of a GPU in several parts only the first row names its mode, the others say "N/A".
    """
    data = _json_after_warnings(text)
    rows = data.get("current_partition") if isinstance(data, dict) else None
    known = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    compute = {_text(row.get("accelerator_type")).rstrip("*") for row in known}
    memory = {_text(row.get("memory")) for row in known}
    return Modes(tuple(sorted(compute - {""})), tuple(sorted(memory - {""})))


def _json_after_warnings(text: str) -> Any:
    """JSON that may follow lines such as "WARNING: AMD GPU device(s) is/are in a low-power state"."""
    start = re.search(r"^\s*[\[{]", text, re.MULTILINE)
    try:
        return json.JSONDecoder().raw_decode(text[start.start() :].lstrip())[0] if start else None
    except (ValueError, RecursionError):
        return None


def _get(card: dict[str, Any], wanted: str) -> str:
    """A value by its key, whatever the capitals; "N/A" is no value."""
    return next((_text(value) for key, value in card.items() if key.casefold() == wanted), "")


def _text(value: Any) -> str:
    text = str(value).strip() if isinstance(value, str | int) else ""
    return "" if text == "N/A" else text


def _dig(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _size(text: str) -> int:
    """`19968 MiB` in bytes; 0 for what is no size."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?I?B)", text.strip().upper())
    return int(match[1]) * UNITS[match[2]] if match else 0
