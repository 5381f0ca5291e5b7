"""What a run cost: time, peak memory, and per accelerator what it took of it. The names are those the client reads."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from edif_hpc.worker.process import peak_bytes

ASKED = re.compile(r"Tried to allocate ([\d.]+) ([KMG]iB)")
ASKED_ON = re.compile(r"GPU (\d+) has")
SCALE = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


class Meter:
    """Starts when made; `meta` reads it. The accelerator half ran on no device yet."""

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self._devices = devices
        self._on_gpu = devices[0].type == "cuda"  # HIP answers to the same name
        self._shortfall: dict[str, int] = {}
        self._started = time.perf_counter()
        if self._on_gpu:
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)

    def out_of_memory(self, error: BaseException) -> None:
        asked = ASKED.search(str(error))
        if self._on_gpu and asked:
            full = ASKED_ON.search(str(error))
            index = int(full[1]) if full else self._devices[0].index or 0
            free, _ = torch.cuda.mem_get_info(index)
            wanted = int(float(asked[1]) * SCALE[asked[2]])
            self._shortfall = {str(index): max(0, wanted - free)}

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"runtime": time.perf_counter() - self._started}
        peaks = {str(d.index or 0): torch.cuda.max_memory_allocated(d) for d in self._devices} if self._on_gpu else {}
        totals = {index: torch.cuda.mem_get_info(int(index))[1] for index in peaks}
        meta["max_mem_by_gpu"] = peaks
        meta["max_mem_pct_by_gpu"] = {index: 100 * peak / totals[index] for index, peak in peaks.items()}
        meta["max_memory_usage"] = sum(peaks.values()) if peaks else peak_bytes()
        return meta | ({"alloc_shortfall_by_gpu": self._shortfall} if self._shortfall else {})
