from __future__ import annotations

import os
from typing import get_args

import torch

from cluster import hardware
from cluster.config.generation import GPUName


def test_the_setting_has_every_gpu_of_the_table():
    assert set(get_args(GPUName)) == set(hardware.GPUS)


def test_a_gpu_is_found_by_the_name_of_its_device():
    found = hardware.find_gpu("NVIDIA H100 PCIe")
    assert found and (found.flops, found.bandwidth, found.memory) == (756e12, 2.0e12, 80e9)
    assert hardware.find_gpu("NVIDIA L40S") == hardware.GPUS["L40S"] and hardware.find_gpu("Tesla T4") is None


def test_the_cpu_is_measured_once_and_the_threads_of_torch_are_kept():
    threads = torch.get_num_threads()
    cpu = hardware.measure_cpu()
    assert cpu.name == f"{len(os.sched_getaffinity(0))} CPU core(s)" and torch.get_num_threads() == threads
    # A core does more than 0.1 and less than 10,000 GFLOP/s; its memory more than 10 MB/s and less than 10 TB/s.
    assert 1e8 < cpu.flops < 1e13 * os.cpu_count() and 1e7 < cpu.bandwidth < 1e13
    assert hardware.measure_cpu() is cpu
