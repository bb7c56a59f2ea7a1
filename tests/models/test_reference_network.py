from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ernet_fast.models import ERStage
from ernet_fast.reference.er_network import (
    NaiveERStage,
    NaivePairShortcuts,
    naive_er_resnet,
    state_dict_from_fused,
    state_dict_to_fused,
)


def float64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sum_of_a_block_by_hand() -> None:
    shortcuts = NaivePairShortcuts(1, 2).double()
    with torch.no_grad():
        shortcuts.weight.copy_(float64([[2.0], [10.0]]))
    x_0 = float64([-1.0, 1.0]).view(1, 1, 1, 2)  # mean 0, variance 1
    x_1 = float64([1.0, 5.0]).view(1, 1, 1, 2)  # mean 3, variance 4
    x_2 = float64([100.0, 200.0]).view(1, 1, 1, 2)
    n_0, n_1 = 1 / (1 + 1e-5) ** 0.5, 2 / (4 + 1e-5) ** 0.5
    expected = float64([100 - 2 * n_0 - 10 * n_1, 200 + 2 * n_0 + 10 * n_1])
    torch.testing.assert_close(shortcuts([x_0, x_1, x_2]).flatten(), expected, rtol=1e-14, atol=0)
    # momentum 0.1, unbiased variances 2 and 8
    torch.testing.assert_close(shortcuts.norms[1].running_mean, float64([0.3]))
    torch.testing.assert_close(shortcuts.norms[1].running_var, float64([0.9 + 0.1 * 8]))
    shortcuts.eval()
    n_0 = float64([-1.0, 1.0]) / (0.9 + 0.1 * 2 + 1e-5) ** 0.5
    n_1 = (float64([1.0, 5.0]) - 0.3) / (0.9 + 0.1 * 8 + 1e-5) ** 0.5
    expected = float64([100.0, 200.0]) + 2 * n_0 + 10 * n_1
    torch.testing.assert_close(shortcuts([x_0, x_1, x_2]).flatten(), expected, rtol=1e-14, atol=0)


def test_group_norm_by_hand() -> None:
    shortcuts = NaivePairShortcuts(2, 1, norm="group", num_groups=1).double()
    x_0 = float64([0.0, 0.0, 2.0, 2.0]).view(1, 2, 1, 2)  # mean 1, variance 1 over the sample
    out = shortcuts([x_0, torch.zeros_like(x_0)])
    expected = float64([-1.0, -1.0, 1.0, 1.0]).view(1, 2, 1, 2) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)


def test_every_pair_has_a_normaliser_of_its_own() -> None:
    net = naive_er_resnet(18, 3, base_channels=4)
    pairs = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d) and not module.affine]
    assert len(pairs) == 4 and len({id(module) for module in pairs}) == 4
    stage = NaiveERStage(2, 2, 2, 5, block="basic")
    assert sum(not m.affine for m in stage.modules() if isinstance(m, nn.BatchNorm2d)) == 1 + 2 + 3 + 4


def test_state_dicts_map_both_ways() -> None:
    stage = ERStage(3, 8, 3)
    for buffer in stage.buffers():
        buffer.copy_(torch.randn(buffer.shape) if buffer.is_floating_point() else torch.tensor(5))
    state = stage.state_dict()
    naive = state_dict_from_fused(state)
    reference = NaiveERStage(3, 2, 8, 3, block="bottleneck")
    reference.load_state_dict(naive)
    assert torch.equal(naive["2.shortcut.norms.1.running_var"], state["2.shortcut.running_var"][1])
    back = state_dict_to_fused(naive)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    naive["2.shortcut.norms.1.running_var"].zero_()
    assert not torch.equal(state["2.shortcut.running_var"][1], torch.zeros(8))  # clones


def test_unequal_counts_cannot_be_fused() -> None:
    naive = state_dict_from_fused(ERStage(3, 8, 3).state_dict())
    naive["2.shortcut.norms.1.num_batches_tracked"] += 1
    with pytest.raises(ValueError, match=r"pairs of 2\.shortcut have counted different numbers of batches: \[0, 1\]"):
        state_dict_to_fused(naive)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"depth": 20}, "depth must be one of"),
        ({"depth": 18, "block": "bottleneck"}, "block must be 'standard' or 'er133'"),
        ({"depth": 18, "norm": "layer"}, "norm must be 'batch' or 'group'"),
    ],
)
def test_errors(kw: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        naive_er_resnet(**kw)
