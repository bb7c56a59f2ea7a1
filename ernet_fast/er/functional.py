"""The ER shortcut sum as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernet_fast import _backend
from ernet_fast.er import operators
from ernet_fast.er.arguments import check_shortcut_sum
from ernet_fast.er.coefficients import NO_NORM, ShortcutArguments
from ernet_fast.er.epilogue_composed import BatchStage, one_call_serves
from ernet_fast.er.process_group import ProcessGroup
from ernet_fast.er.shortcut_sum import one_operator_serves, whole_shortcut_sum
from ernet_fast.er.traceable_stage import FusedMaps
from ernet_fast.er.unfused_coefficients import map_statistics, shortcut_coefficients, update_running
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
        xs: l + 1 maps [N, C, H, W] of one shape, dtype (float32, float64, bfloat16, float16) and device, contiguous or
            channels-last. Maps of mixed or other strides are copied into one layout first.
        weight: [l, C], float32 or the dtype of the maps.
        norm: "batch" (per channel, over N, H and W) or "group" (per sample and group of channels).
        num_groups: for norm="group" (1 is layer norm, C instance norm).
        running_mean: for norm="batch", l tensors [C] or one [l, C], or None. In training they are moved in place
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
        `ernet_fast.reference.er_shortcut_sum`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, value or combination that does not fit. Nothing has been computed or changed then.
    """
    means, variances = check_shortcut_sum(
        xs, weight, norm, num_groups, running_mean, running_var, training, momentum, eps
    )
    if not operators.serves(xs[0]) or xs[0].numel() == 0:
        if xs[0].device.type == "cpu" and not _backend.extension_available():
            _backend.warn_fallback_once()
        return reference_shortcut_sum(
            xs,
            weight,
            norm=norm,
            num_groups=num_groups,
            running_mean=means,
            running_var=variances,
            training=training,
            momentum=momentum,
            eps=eps,
            relu=relu,
        )
    layout = operators.layout_of(xs)
    if one_call_serves(xs[0]) and norm == "batch":
        mean = var = None
        if means and variances:
            mean, var = torch.stack(list(means)), torch.stack(list(variances))
        shortcut = ShortcutArguments(weight, mean, var, None, mean is not None and not training, momentum)
        y = batch_shortcut_sum([operators.in_layout(x, layout) for x in xs], shortcut, training, eps, relu)
        if training and means and variances and mean is not None and var is not None:
            with torch.no_grad():
                torch._foreach_copy_([*means, *variances], [*mean.unbind(0), *var.unbind(0)])
        return y
    maps = FusedMaps(per_sample=norm == "group")
    by_batch = norm == "group" or training
    statistics = []
    for i, x in enumerate(xs):
        earlier = i < len(xs) - 1
        moments, _ = maps.file(operators.in_layout(x, layout), measure=by_batch and earlier)
        statistics.append(map_statistics(moments, num_groups=num_groups))
    dtype = operators.acc_dtype(xs[0])
    count = xs[0].shape[0] * xs[0].shape[2] * xs[0].shape[3]
    running = None
    if norm == "batch" and means is not None and variances is not None:
        if training:
            for mean, var, measured in zip(means, variances, statistics, strict=False):
                assert measured.mean is not None and measured.var is not None
                update_running(mean, var, measured.mean, measured.var, count, momentum)
        elif means:
            running = torch.stack(list(means)).to(dtype), torch.stack(list(variances)).to(dtype)
    a, b = shortcut_coefficients(weight.to(dtype), statistics[:-1], statistics[-1], running, eps, xs[0].shape[0])
    return maps.weighted_sum(a, b, relu)


def batch_shortcut_sum(
    xs: Sequence[Tensor],
    shortcut: ShortcutArguments,
    training: bool,
    eps: float,
    relu: bool,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The sum with norm="batch" and the algebra in one call.

    Args:
        xs: maps of one layout, whose arguments have been checked.
        shortcut: weights, and running statistics to be moved or used.
        training: normalise with the statistics of the batch.
        eps: added to variances.
        relu: apply the ReLU.
        group: processes over which the statistics are taken.
    """
    if group is None and one_operator_serves(xs[0], shortcut):
        return whole_shortcut_sum(xs, shortcut, eps, relu)
    stage = BatchStage(len(xs), eps, measure=training, group=group)
    for x in xs[:-1]:
        stage.open(x)
    return stage.block(xs[-1], NO_NORM, shortcut, relu, measure=False)
