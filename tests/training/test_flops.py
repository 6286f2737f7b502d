from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.config import ScorerConfig, TrainingConfig
from training import encoder_kernels, flops
from training.scorer import new_model


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_exact_model_or_unknown(name: str, tera: float | None):
    assert flops.peak_flops(name) == (tera and tera * 1e12)


def test_a_cpu_has_no_peak():
    assert flops.device_peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("plain", [True, False])
def test_the_operations_equal_the_count_of_torch(plain: bool, frozen: int, encoder: Path):
    model = new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(frozen_layers=frozen), seed=1)
    if plain:
        encoder_kernels.restore_last_layer(model)
    assert encoder_kernels.computes_first_token_only(model) is not plain
    ids = torch.ones((3, 40), dtype=torch.long)
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(input_ids=ids).logits.sum().backward()
    # The counter leaves out the pooler, the head and the layers that compute one token. It counts gradients of the frozen output, too.
    assert flops.FlopCounter(model)(3 * 40, 3 * 40**2) == pytest.approx(counted.get_total_flops(), rel=0.1 if frozen else 0.05)
