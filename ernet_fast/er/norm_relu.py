"""BatchNorm and ReLU in an ER-ResNet where no ER block ends, by the operators of the block epilogues.

    batch_norm_relu   ReLU(bn(z)):           an epilogue without earlier maps
    projection_sum    ReLU(bn(z) + bn_s(s)): an epilogue with one earlier map s, whose weight is gamma of bn_s; its beta
                                             is added to that of bn
    sum_relu          ReLU(z + s):           a weighted sum, in inference

So statistics, normalisation, sum and ReLU are one pass, and backward writes each map's gradient once. Where these
operators do not support a map, and for modules that are not plain (hooks, parametrisations, subclasses), the modules
are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.er import epilogue
from ernet_fast.er.epilogue import er_block, er_block_backward
from ernet_fast.er.epilogue_arguments import BranchNorm, EpilogueState, NormArguments, ShortcutArguments, norm_arguments
from ernet_fast.er.nodes import FusedStage, vector_gradients
from ernet_fast.er.operators import (
    Node,
    acc_dtype,
    check_first_order,
    dense,
    layout_of,
    relu_gradient,
    weighted_sum,
    why_plain,
)
from ernet_fast.er.plain import is_plain


def norms_supported(x: Tensor) -> bool:
    """True if the operators of this module support maps like `x` [N, C, H, W]; on a GPU `projection_sum` alone does.

    By count of map accesses BatchNorm and ReLU have little to win over cuDNN there (docs/er-shortcuts.md).
    """
    return why_plain(x) is None and not torch.compiler.is_compiling() and x.dim() == 4 and x.numel() > 0


def batch_norm_relu(z: Tensor, bn: nn.Module, relu: nn.Module, *, fused: bool | None = None) -> Tensor:
    """`relu(bn(z))`, on the CPU in one pass.

    Args:
        z: [N, C, H, W].
        bn: fused if it is a plain `nn.BatchNorm2d`.
        relu: fused if it is a plain `nn.ReLU`.
        fused: False calls the modules; True says that `norms_supported` has been asked, of z or of a map like it.
    """
    if fused is None:
        fused = norms_supported(z)
    # degenerate input: nn.BatchNorm2d handles or rejects it
    if not (fused and z.device.type == "cpu" and is_plain(relu, nn.ReLU, bn, nn.BatchNorm2d)) or (
        z.numel() == z.shape[1] or bn.num_features != z.shape[1]
    ):
        out: Tensor = relu(bn(z))
        return out
    z = dense(z)
    norm = norm_arguments(bn)
    gamma, beta = norm.gamma, norm.beta
    if torch.is_grad_enabled() and (
        z.requires_grad or (gamma is not None and gamma.requires_grad) or (beta is not None and beta.requires_grad)
    ):
        y: Tensor = _BatchNormReLU.apply(z, gamma, beta, norm)
        return y
    return _forward(z, norm)[0]


def projection_sum(
    z: Tensor, bn: nn.Module, s: Tensor, bn_s: nn.Module, relu: nn.Module, *, fused: bool | None = None
) -> Tensor:
    """`relu(bn(z) + bn_s(s))` in one pass.

    Args:
        z: [N, C, H, W], of a block's branch.
        bn: fused if it is an `nn.BatchNorm2d`.
        s: likewise, of its projection shortcut.
        bn_s: fused if it is an `nn.BatchNorm2d` with weights.
        relu: fused if it is an `nn.ReLU`.
        fused: see `batch_norm_relu`.
    """
    if fused is None:
        fused = norms_supported(z)
    if not (
        fused and z.shape == s.shape and z.dtype == s.dtype and z.device == s.device and z.numel() > z.shape[1]
    ) or not (
        is_plain(relu, nn.ReLU, bn, nn.BatchNorm2d, bn_s, nn.BatchNorm2d)
        and bn.num_features == bn_s.num_features == z.shape[1]
        and bn_s.weight is not None
    ):
        out: Tensor = relu(bn(z) + bn_s(s))
        return out
    norm, last = norm_arguments(bn), norm_arguments(bn_s)
    if last.beta is not None:
        norm = norm._replace(beta=last.beta if norm.beta is None else norm.beta + last.beta)
    assert last.gamma is not None
    weight = last.gamma.unsqueeze(0)
    mean = None if last.mean is None else last.mean.unsqueeze(0)
    var = None if last.var is None else last.var.unsqueeze(0)
    use_running = last.norm == BranchNorm.RUNNING
    shortcut = ShortcutArguments(weight, mean, var, last.batches, use_running, last.momentum)
    composed = not epilogue.block_operator_supports(z, None)
    stage = FusedStage([weight], eps=last.eps, measure=not use_running, composed=composed)
    stage.start(s)
    return stage.block(z, norm, shortcut, relu=True, measure=False)


def sum_relu(z: Tensor, s: Tensor, relu: nn.Module) -> Tensor:
    """`relu(z + s)`, in one pass where no gradient is wanted.

    Args:
        z: [N, C, H, W], of a block's branch, normalised.
        s: likewise, its shortcut.
        relu: fused if it is a plain `nn.ReLU`.
    """
    if (
        not (norms_supported(z) and z.shape == s.shape and z.dtype == s.dtype and is_plain(relu, nn.ReLU))
        or (torch.is_grad_enabled() and (z.requires_grad or s.requires_grad))
    ):  # fmt: skip
        out: Tensor = relu(z + s)
        return out
    layout = layout_of([z, s])
    maps = [x.contiguous(memory_format=layout) for x in (z, s)]
    return weighted_sum(maps, z.new_ones((2, z.shape[1]), dtype=acc_dtype(z)), None, True)


def _forward(z: Tensor, norm: NormArguments) -> tuple[Tensor, EpilogueState]:
    state = EpilogueState(z, 1, norm.eps, measure=False, composed=False)
    no_map = ShortcutArguments(z.new_empty((0, z.shape[1]), dtype=state.vector_dtype))
    return er_block(state, [z], norm, no_map, measure=False, relu=True), state


class _BatchNormReLU(Node):
    """(z, gamma, beta, norm) -> y."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: NormArguments) -> Tensor:
        y, ctx.state = _forward(z, norm)
        ctx.norm = norm.norm
        ctx.dtypes = None if gamma is None else gamma.dtype, None if beta is None else beta.dtype
        ctx.save_for_backward(z, y.detach())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return _BatchNormReLU.run_untraced(ctx, dy)
        check_first_order(dy)
        z, y = ctx.saved_tensors
        state: EpilogueState = ctx.state
        needs_dz, needs_dgamma, needs_dbeta, _ = ctx.needs_input_grad
        state.needs_dots = state.measured[0] or needs_dgamma or needs_dbeta
        dy = dy.contiguous(memory_format=state.layout)
        if not state.needs_dots:
            dy, y = relu_gradient(dy, y), None
        found = er_block_backward(state, 0, z, ctx.norm, (), dy=dy, y=y, needed=needs_dz)
        dgamma, dbeta = vector_gradients(found, ctx.dtypes)
        return found.dz if needs_dz else None, dgamma, dbeta, None
