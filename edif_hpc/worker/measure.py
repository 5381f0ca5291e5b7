"""What a run cost: time, peak memory, and per accelerator what it took of it. The names are those the client reads."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from edif_hpc.worker.process import peak_bytes

ASKED = re.compile(r"Tried to allocate ([\d.]+) ([KMG]iB)")
SCALE = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


class Meter:
    """Starts when made; `meta` reads it. The accelerator half ran on no device yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shortfall: dict[str, int] = {}
        self._started = time.perf_counter()
        if device.type == "cuda":  # HIP answers to the same name
            torch.cuda.reset_peak_memory_stats(device)

    def out_of_memory(self, error: BaseException) -> None:
        asked = ASKED.search(str(error))
        if self._device.type == "cuda" and asked:
            free, _ = torch.cuda.mem_get_info(self._device)
            wanted = int(float(asked[1]) * SCALE[asked[2]])
            self._shortfall = {str(self._device.index or 0): max(0, wanted - free)}

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"runtime": time.perf_counter() - self._started}
        if self._device.type == "cuda":
            index, peak = str(self._device.index or 0), torch.cuda.max_memory_allocated(self._device)
            _, total = torch.cuda.mem_get_info(self._device)
            meta |= {"max_mem_by_gpu": {index: peak}, "max_mem_pct_by_gpu": {index: 100 * peak / total}}
        else:
            peak = peak_bytes()
            meta |= {"max_mem_by_gpu": {}, "max_mem_pct_by_gpu": {}}
        meta["max_memory_usage"] = peak
        return meta | ({"alloc_shortfall_by_gpu": self._shortfall} if self._shortfall else {})
