"""The ER shortcut sum as a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ernet_fast import _backend
from ernet_fast.er import operators
from ernet_fast.er.arguments import check_shortcut_sum
from ernet_fast.er.epilogue_arguments import ShortcutArguments
from ernet_fast.er.shortcut_sum import shortcut_sum
from ernet_fast.reference.er import er_shortcut_sum as reference_shortcut_sum


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
    """`xs[-1] + sum_i weight[i] * N(xs[i])`, then ReLU if asked, in one pass over the maps.

    N normalises a map to zero mean and unit variance, without affine parameters. Equation (10) of the ERNet paper
    (Chandana Mani and Kamalakannan, ELCVIA).

    Args:
        xs: l + 1 feature maps [N, C, H, W] of one shape, dtype (float32, float64, bfloat16, float16) and device,
            contiguous or channels-last. Maps of mixed or other strides are copied into one layout first.
        weight: [l, C], float32 or the dtype of the maps.
        norm: "batch" (per channel, over N, H and W) or "group" (per sample and group of channels).
        num_groups: for norm="group" (1 is layer norm, C instance norm).
        running_mean: for norm="batch", l tensors [C] or one [l, C], or None. In training they are updated in place
            towards the means of the batch; otherwise they are what N uses.
        running_var: likewise, the variances (in training, towards the unbiased ones).
        training: with norm="batch", normalise with the statistics of the batch.
        momentum: of the running statistics, from 0 to 1.
        eps: added to variances, > 0.
        relu: apply the ReLU.

    Returns:
        [N, C, H, W] in the dtype and layout of `xs[-1]`. NaN and infinity propagate as in the plain composition: those
        of an earlier map make its mean and variance NaN, and so the whole channel (with norm="group" the sample's
        group) of the result, and the running statistics; those of `xs[-1]` stay where they are.
        Differentiable once in the maps and the weight; for second derivatives use
        `ernet_fast.reference.er_shortcut_sum`. Under transforms of `torch.func`, forward-mode AD and `torch.jit.trace`
        the plain composition is computed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, value or combination that does not fit. Nothing has been computed or changed then.
    """
    options: dict[str, Any] = {
        "norm": norm, "num_groups": num_groups, "training": training, "momentum": momentum, "eps": eps, "relu": relu
    }  # fmt: skip
    means, variances = check_shortcut_sum(xs, weight, running_mean=running_mean, running_var=running_var, **options)
    options["eps"] = eps = float(eps)  # NumPy's too are numbers
    options["momentum"] = momentum = float(momentum)
    if xs[0].numel() == 0 or operators.why_plain(xs[0]) is not None:
        if xs[0].device.type == "cpu" and not operators.COMPILED:
            _backend.warn_fallback_once()
        return reference_shortcut_sum(xs, weight, running_mean=means, running_var=variances, **options)
    mean = var = None
    if means and variances:
        mean, var = torch.stack(list(means)), torch.stack(list(variances))
    shortcut = ShortcutArguments(weight, mean, var, None, mean is not None and not training, momentum)
    y = shortcut_sum(xs, shortcut, measure=training or norm == "group", num_groups=num_groups, eps=eps, relu=relu)
    if training and means and variances and mean is not None and var is not None:
        with torch.no_grad():
            torch._foreach_copy_([*means, *variances], [*mean.unbind(0), *var.unbind(0)])
    return y
