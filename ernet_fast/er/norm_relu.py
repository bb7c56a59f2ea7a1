"""BatchNorm and ReLU in an ER-ResNet where no ER block ends: by the operators of the tails, as stages of their own.

    batch_norm_relu   ReLU(bn(z)):           a tail without earlier maps
    projection_sum    ReLU(bn(z) + bn_s(s)): a tail with one earlier map s, whose weight is gamma of bn_s; its beta is
                                             added to that of bn

So statistics, normalisation, sum and ReLU are one pass, and backward writes each map's gradient once, with nothing
between. Wherever these operators do not serve, and where somebody watches the modules, the modules are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ernet_fast.er import operators
from ernet_fast.er._autograd import forbid_double_backward, in_dtype, relu_gradient
from ernet_fast.er.batch_norms import norm_arguments, uses_batch
from ernet_fast.er.coefficients import (
    NO_SHORTCUT,
    BranchNorm,
    NormArguments,
    ShortcutArguments,
    count_changes,
    new_table,
    with_contiguous_vectors,
)
from ernet_fast.er.epilogue import er_block, er_block_backward, one_operator_serves
from ernet_fast.er.epilogue_composed import BatchStage, one_call_serves
from ernet_fast.er.whole_stage import WholeStage


def batch_norm_relu(z: Tensor, bn: nn.Module, relu: nn.Module, *, fused: bool = True) -> Tensor:
    """`relu(bn(z))`, on the CPU in one pass.

    On a GPU the modules are called: by count of map accesses there is little to win over cuDNN (docs/er-shortcuts.md).

    Args:
        z: [N, C, H, W].
        bn: fused if it is an `nn.BatchNorm2d`.
        relu: fused if it is an `nn.ReLU`.
        fused: False calls the modules.
    """
    if not (fused and one_operator_serves(z, None) and _serves(z, relu, bn)):
        out: Tensor = relu(bn(z))
        return out
    z = operators.in_layout(z, operators.layout_of([z]))
    norm, _ = with_contiguous_vectors(norm_arguments(bn), NO_SHORTCUT)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (z, norm.gamma, norm.beta)):
        y: Tensor = _BatchNormReLU.apply(z, norm.gamma, norm.beta, norm)
        return y
    return _forward(z, norm)[0]


def projection_sum(
    z: Tensor, bn: nn.Module, s: Tensor, bn_s: nn.Module, relu: nn.Module, *, whole: bool = True
) -> Tensor:
    """`relu(bn(z) + bn_s(s))` in one pass.

    Args:
        z: [N, C, H, W], of a block's branch.
        bn: fused if it is an `nn.BatchNorm2d`.
        s: likewise, of its projection shortcut.
        bn_s: fused if it is an `nn.BatchNorm2d` with weights.
        relu: fused if it is an `nn.ReLU`.
        whole: use one operator each way where there is one; otherwise, and on GPUs, one operator a step.
    """
    alike = z.shape == s.shape and z.dtype == s.dtype and z.device == s.device
    if not (alike and _serves(z, relu, bn, bn_s) and isinstance(bn_s.weight, Tensor)):
        out: Tensor = relu(bn(z) + bn_s(s))
        return out
    norm, last = norm_arguments(bn), norm_arguments(bn_s)
    betas = [beta for beta in (norm.beta, last.beta) if beta is not None]
    norm = norm._replace(beta=betas[0] + betas[1] if len(betas) == 2 else betas[0] if betas else None)
    weight = last.gamma
    assert weight is not None
    weight = weight.unsqueeze(0)
    mean, var = (None if v is None else v.unsqueeze(0) for v in (last.mean, last.var))
    use_running = last.norm == BranchNorm.RUNNING
    shortcut = ShortcutArguments(weight, mean, var, last.batches, use_running, last.momentum)
    stage: WholeStage | BatchStage
    if whole and one_operator_serves(z, None):
        stage = WholeStage([weight], last.eps, measure=not use_running)
    else:
        stage = BatchStage(2, last.eps, measure=not use_running)
    stage.open(s)
    return stage.block(z, norm, shortcut, True, measure=False)


def watched(module: nn.Module) -> bool:
    """True if somebody has registered a hook that a call of this module would run."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _serves(z: Tensor, relu: nn.Module, *bns: nn.Module) -> bool:
    """True if the operators do for z what these modules would, and nobody would miss a call of theirs."""
    if type(relu) is not nn.ReLU or z.dim() != 4 or z.numel() == 0 or not one_call_serves(z) or watched(relu):
        return False
    for bn in bns:
        if type(bn) is not nn.BatchNorm2d or bn.num_features != z.shape[1] or watched(bn):
            return False
        if uses_batch(bn) and (z.numel() == z.shape[1] or (bn.momentum is None and bn.num_batches_tracked is None)):
            return False  # what bn makes of this, be it an error, is its own affair
    return True


def _no_shortcut(z: Tensor) -> ShortcutArguments:
    """Shortcuts from no map at all."""
    return ShortcutArguments(z.new_empty((0, z.shape[1]), dtype=operators.acc_dtype(z)), None, None, None, False, 0.0)


def _forward(z: Tensor, norm: NormArguments) -> tuple[Tensor, Tensor, Tensor]:
    """y, the a of its sum, and the table of z."""
    table, shortcut = new_table(z, 1), _no_shortcut(z)
    y, a = er_block([z], table, 0, False, norm.norm == BranchNorm.BATCH, norm, shortcut, norm.eps, True)
    count_changes(norm, shortcut)
    return y, a, table


class _BatchNormReLU(torch.autograd.Function):
    """(z, gamma, beta, norm) -> y."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: NormArguments) -> Tensor:
        y, a, table = _forward(z.detach(), norm)
        ctx.norm, ctx.layout = norm.norm, operators.layout_of([z])
        ctx.dtypes = [None if v is None else v.dtype for v in (gamma, beta)]
        ctx.save_for_backward(z, y, a, table)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        z, y, a, table = ctx.saved_tensors
        measured = ctx.norm == BranchNorm.BATCH
        vectors = measured or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dy = operators.in_layout(dy, ctx.layout)
        if not vectors:
            dy, y = relu_gradient(dy, y), None
        dz, _, _, *found, _ = er_block_backward(
            0,
            z,
            dy,
            y,
            a,
            [],
            None,
            table,
            ctx.norm,
            0.0,
            dots=vectors,
            measured=measured,
            needed=ctx.needs_input_grad[0],
        )
        dvectors = [
            in_dtype(v, dtype) if wanted and dtype is not None else None
            for v, dtype, wanted in zip(found, ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        ]
        return dz if ctx.needs_input_grad[0] else None, *dvectors, None
