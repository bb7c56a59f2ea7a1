"""The reference shortcut sum against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from ernet_fast.reference import er_shortcut_sum

TINY = 1e-30  # PyTorch wants a positive eps; this one changes no digit


def column(*values: float) -> torch.Tensor:
    """A map of one channel, one row, as float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def test_two_maps_by_hand():
    """x_0 = (1, 3): mean 2, variance 1, N(x_0) = (-1, 1). With w = 2 and x_1 = (1, -4): y = (-1, -2)."""
    weight = torch.tensor([[2.0]], dtype=torch.float64)
    y = er_shortcut_sum([column(1, 3), column(1, -4)], weight, eps=TINY)
    torch.testing.assert_close(y, column(-1, -2))
    torch.testing.assert_close(
        er_shortcut_sum([column(1, 3), column(4, -4)], weight, eps=TINY, relu=True), column(2, 0)
    )


def test_three_maps_by_hand_and_running_statistics():
    """Adds x_1 = (0, 8): mean 4, standard deviation 4, N = (-1, 1), weight 1/2; unbiased variances 2 and 32."""
    weight = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    means, variances = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    y = er_shortcut_sum(
        [column(1, 3), column(0, 8), column(5, 5)], weight, eps=TINY, running_mean=means, running_var=variances
    )
    torch.testing.assert_close(y, column(2.5, 7.5))
    torch.testing.assert_close(means, torch.tensor([[0.2], [0.4]], dtype=torch.float64))
    torch.testing.assert_close(variances, torch.tensor([[1.1], [4.1]], dtype=torch.float64))


def test_evaluation_by_hand():
    """Running mean 1 and variance 4: N((1, 3)) = (0, 1)."""
    y = er_shortcut_sum(
        [column(1, 3), column(0, 0)],
        torch.tensor([[3.0]], dtype=torch.float64),
        eps=TINY,
        training=False,
        running_mean=torch.tensor([[1.0]], dtype=torch.float64),
        running_var=torch.tensor([[4.0]], dtype=torch.float64),
    )
    torch.testing.assert_close(y, column(0, 3))


def test_group_norm_by_hand():
    """Two channels (1, 3) and (5, 7) in one group: mean 4, variance 5; in two groups each becomes (-1, 1)."""
    x0 = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    weight = torch.ones(1, 2, dtype=torch.float64)
    zero = torch.zeros_like(x0)
    y = er_shortcut_sum([x0, zero], weight, norm="group", num_groups=1, eps=TINY)
    torch.testing.assert_close(y, (x0 - 4) / 5**0.5)
    y = er_shortcut_sum([x0, zero], weight, norm="group", num_groups=2, eps=TINY)
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))


def test_one_map_is_returned_as_it_is():
    x = column(-1, 2)
    torch.testing.assert_close(er_shortcut_sum([x], torch.empty(0, 1, dtype=torch.float64)), x)


def test_gradient_by_hand():
    """dy/dw of the two-map case is N(x_0) summed with dy = (1, 10): -1 + 10."""
    weight = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    y = er_shortcut_sum([column(1, 3), column(1, -4)], weight, eps=TINY)
    (y * column(1, 10)).sum().backward()
    assert weight.grad is not None and weight.grad.item() == pytest.approx(9.0)
