"""Speed and memory of GPUs from their data sheets, and of this machine's CPU by a short measurement.

Imports torch only to measure the CPU and to read the name of a GPU.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

_COPY_BYTES = 32 << 20
"""Bytes that each thread copies: larger than the caches."""
_PROBE_S = 0.3
"""Time of each of the two measurements, in seconds."""
# A decoding step multiplies the states of a batch with a weight matrix.
_BATCH, _WIDTH = 64, 1024


@dataclass(frozen=True)
class Device:
    """A GPU, or all CPU cores of a machine."""

    name: str
    flops: float
    """Dense bfloat16 FLOP/s: the peak of a GPU, or the measured rate of a CPU."""
    bandwidth: float
    """Memory bandwidth in bytes/s: the peak of a GPU, or the measured rate of a CPU."""
    memory: float | None = None
    """Memory in bytes; None for a CPU, whose KV cache has a setting."""


# From the makers' data sheets: dense bfloat16 TFLOP/s, memory bandwidth in TB/s, memory in GB. The first name that is in the name of a
# device counts.
_SHEETS = {
    "B200": (2250, 8.0, 180),
    "H100 PCIe": (756, 2.0, 80),
    "H100 NVL": (835, 3.9, 94),
    "H100": (989, 3.35, 80),
    "H200": (989, 4.8, 141),
    "GH200": (989, 4.0, 96),
    "A100": (312, 2.0, 80),
    "L40S": (362, 0.864, 48),
    "L4": (121, 0.3, 24),
    "A10G": (70, 0.6, 24),
    "RTX A6000": (155, 0.768, 48),
    "RTX 4090": (165, 1.008, 24),
}
GPUS = {name: Device(name, peak * 1e12, bandwidth * 1e12, memory * 1e9) for name, (peak, bandwidth, memory) in _SHEETS.items()}
"""The known GPUs by name."""


def find_gpu(device_name: str) -> Device | None:
    """Return the GPU whose name is in the name of a device (`torch.cuda.get_device_name`); None for an unknown GPU."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device_name)), None)


def local_gpu() -> Device | None:
    """Return the first GPU of this machine; None without a GPU, or with an unknown one."""
    if not Path("/dev/nvidia0").exists():
        return None
    import torch

    gpu = find_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    # A GPU is sold with several sizes of memory.
    return gpu and replace(gpu, memory=float(torch.cuda.get_device_properties(0).total_memory))


@lru_cache(maxsize=1)
def measure_cpu() -> Device:
    """Measure the CPU cores that this process may use. Takes about a second, without the import of torch.

    The bandwidth is the fastest of several copies by all cores. The FLOP/s are the fastest of several products of one core, times the
    cores. Other processes on the machine lower the bandwidth more than the FLOP/s.
    """
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    pairs = [(np.ones(_COPY_BYTES, np.uint8), np.empty(_COPY_BYTES, np.uint8)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        copied = _fastest(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    states, weights = torch.ones(_BATCH, _WIDTH, dtype=torch.bfloat16), torch.ones(_WIDTH, _WIDTH, dtype=torch.bfloat16)
    torch.set_num_threads(1)  # threads that wait for each other would measure the other processes
    try:
        multiplied = _fastest(lambda: states @ weights.T)
    finally:
        torch.set_num_threads(threads)
    # A copy reads and writes each byte.
    return Device(f"{cores} CPU core(s)", cores * 2 * _BATCH * _WIDTH**2 / multiplied, 2 * _COPY_BYTES * cores / copied)


def _fastest(work: Callable[[], object]) -> float:
    """Return the shortest time of a call of `work`, in seconds, over about `_PROBE_S`; at least three calls."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < _PROBE_S:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
