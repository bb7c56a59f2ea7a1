from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ernet_fast.models import ERResNet, ERStage, count_flops, er_resnet50
from ernet_fast.models.flops import PAPER_FLOPS, architecture_table

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_one_multiply_accumulate_counts_as_two() -> None:
    linear = count_flops(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2))
    assert (linear.linear, linear.convolution, linear.macs) == (2 * 12 * 5, 0, 12 * 5)
    convolution = count_flops(nn.Conv2d(3, 4, 3, padding=1, groups=1), (2, 3, 5, 7))
    assert convolution.convolution == convolution.total == 2 * (2 * 4 * 5 * 7) * (3 * 9)


def test_er_sums_of_a_stage_by_hand() -> None:
    flops = count_flops(ERStage(6, 8, 4, stride=2, block="basic"), (2, 6, 10, 14))
    values = 2 * 8 * 5 * 7  # of one map
    assert flops.er_shortcut == 2 * (1 + 2 + 3) * values
    branches = 2 * values * 9 * (6 + 8 + 3 * (8 + 8))
    assert flops.convolution == branches + 2 * values * 6
    assert flops.total == flops.er_shortcut + flops.convolution


def test_er_resnet50() -> None:
    with torch.device("meta"):
        model = er_resnet50()
    flops = count_flops(model)
    # 4.09 G multiply-accumulates is the published figure of torchvision's ResNet-50
    assert round((flops.convolution + flops.linear) / 2e9, 2) == 4.09
    sizes = [(256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3)]
    assert flops.er_shortcut == 2 * sum(c * hw * hw * length * (length - 1) // 2 for c, hw, length in sizes)


def test_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = ERResNet("basic", (2, 1, 1, 1), 3, base_channels=4).train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    first = count_flops(model, (3, 64, 64))
    model.set_fused(False)
    assert count_flops(model, (1, 3, 64, 64)) == first
    assert model.training and not model.layer1.fused
    assert model.conv1.weight.device.type == "cpu"
    assert not model.layer1._forward_hooks
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("size", [(224, 224), (1, 3, 0, 8), (1, 1, 3, 8, 8)])
def test_errors(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_size must be"):
        count_flops(nn.Identity(), size)


def test_documented_table_is_what_the_code_counts() -> None:
    assert architecture_table() in DOCS.read_text(encoding="utf-8")
    assert {18: 3.4e9, 34: 6.2e9, 50: 7.8e9, 101: 9.2e9} == PAPER_FLOPS
