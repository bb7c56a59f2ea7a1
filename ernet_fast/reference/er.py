"""The ER shortcut sum as it is written in the paper: one normalisation for each pair of maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ernet_fast.er.arguments import check_shortcut_sum


def er_shortcut_sum(
    xs: Sequence[Tensor],
    weight: Tensor,
    *,
    norm: str = "batch",
    num_groups: int | None = None,
    running_mean: Sequence[Tensor] | Tensor | None = None,
    running_var: Sequence[Tensor] | Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """`xs[-1] + sum_i weight[i] * N(xs[i])`, then ReLU if asked: plain PyTorch, differentiable, never tuned.

    Equation (10) of the ERNet paper (Chandana Mani and Kamalakannan, ELCVIA). Arguments, result and errors are those
    of `ernet_fast.er_shortcut_sum`, for which this function is the definition.
    """
    means, variances = check_shortcut_sum(
        xs, weight, norm, num_groups, running_mean, running_var, training, momentum, eps, relu
    )
    y = xs[-1]
    for i, x in enumerate(xs[:-1]):
        if norm == "batch":
            mean = None if means is None else means[i]
            var = None if variances is None else variances[i]
            normalised = F.batch_norm(x, mean, var, training=training, momentum=momentum, eps=eps)
        else:
            assert num_groups is not None  # checked above
            normalised = F.group_norm(x, num_groups, eps=eps)
        y = y + weight[i].view(1, -1, 1, 1) * normalised
    if relu:
        y = F.relu(y)
    return y.to(xs[-1].dtype)
