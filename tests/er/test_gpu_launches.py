"""What a GPU would be asked to do in a training step: launches by kernel, and no copy between host and device.

Recorded without a GPU: tensors have no data, the operators of CUDA devices run up to their launches.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from triton_launches import record
from triton_operators import TritonOperators, as_on_cuda

from ernet_fast.models import er_resnet50


@pytest.fixture
def step(monkeypatch) -> tuple[Counter[str], TritonOperators]:
    """Launches and operators of a training step of ER-ResNet-50, batch 32 of 224 x 224, channels-last."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with torch.device("meta"):
        network = er_resnet50(8).train().to(memory_format=torch.channels_last)
        images = torch.empty(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    found: list[Any] = []

    def call() -> None:
        with as_on_cuda() as operators:
            found.append(operators)
            network(images).sum().backward()

    launches = record(monkeypatch, call)
    assert all(parameter.grad is not None for parameter in network.parameters())
    return Counter(launch.kernel for launch in launches), found[0]


def test_launches_of_a_training_step(step):
    """24 maps have moments, of 4 projections two each and of 4 stages x_0 and 12 blocks: two launches each way.

    Then a weighted sum each way, forward for the 16 blocks. The further launches of merges would be 48 more.
    """
    launches, _ = step
    assert launches == {
        "channel_moments_kernel": 24,
        "block_coefficients_kernel": 24,
        "map_dots_kernel": 24,
        "map_coefficients_backward_kernel": 24,
        "weighted_sum_kernel": 16 + 24,
    }
    assert launches.total() == 136


def test_nothing_passes_between_host_and_device(step):
    """So a step can be captured in a CUDA graph: neither a copy, nor a number that is read back."""
    _, operators = step
    assert operators.across == []
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::_pin_memory", "aten::lift_fresh"} & {
        *operators.calls
    }


def test_what_would_be_seen():
    with as_on_cuda() as found:
        torch.ones(2).to("meta")
        assert len(found.across) == 1
        with pytest.raises(RuntimeError):
            float(torch.empty((), device="meta"))
