"""The convolutions of a network's blocks, with weight gradients by an operator of our own where that is faster.

For channels-last float32 maps, oneDNN's weight gradients of 3x3 convolutions reach about half the speed of its forward
pass on CPUs with AVX2 and no AVX-512; `ernet::conv_weight_gradient` (csrc/conv/) takes 0.57 to 0.85 times as long.
Everywhere else, and for modules that are not plain (hooks, parametrisations, subclasses), the module is called.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernet_fast import _backend
from ernet_fast.er.norm_relu import norms_supported
from ernet_fast.er.operators import Node, gradients_are_batched
from ernet_fast.er.plain import is_plain

CHANNEL_TILE = 32
"""Channels of x must be a multiple of it: the largest of `channel_tile` in csrc/conv/simd/weight_gradient.cpp."""
MOST_PIXELS_OF_ONE = 28 * 28
"""Of a map whose 1x1 convolution has its weight gradient by our operator: with more, oneDNN's is as fast."""


def _wanted() -> bool:
    """Whether the operator is used on this CPU: as ERNET_CONV says, else where it was found to be faster."""
    build = _backend.build_info()
    text = os.environ.get("ERNET_CONV", "auto")
    if text not in ("auto", "0", "1"):
        raise ValueError(f"environment variable ERNET_CONV={text}; expected auto, 0 or 1.")
    if build is None or text == "0":
        return False
    return text == "1" or (build["isa"] == "avx2" and torch.backends.cpu.get_cpu_capability() == "AVX2")


_WANTED = _wanted()


def takes_gradients(x: Tensor, *, fused: bool | None = None) -> bool:
    """True if convolutions of maps like `x` [N, C, H, W] may have their weight gradients by our operator.

    It does for float32 channels-last maps. `fused`: see `norm_relu.batch_norm_relu`.
    """
    return (
        _WANTED
        and isinstance(x, Tensor)  # not a value of a symbolic trace
        and torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and (norms_supported(x) if fused is None else fused)
    )


def convolution(x: Tensor, conv: Any) -> Tensor:
    """`conv(x)`, where `takes_gradients(x)`.

    The weight gradient is by our operator for a plain `nn.Conv2d` of a multiple of 32 channels with a 3x3 kernel or, up
    to 28x28 pixels and with several threads, 1x1; without groups, dilation or bias, with zeros for padding, and the
    same stride and padding along both axes.
    """
    if is_plain(conv, nn.Conv2d):
        weight, (kernel, width), (stride, step), padding = conv.weight, conv.kernel_size, conv.stride, conv.padding
        if (
            kernel == width
            and (
                kernel == 3
                # with one thread PyTorch multiplies matrices for a kernel of one pixel, which is faster
                or (
                    kernel == 1
                    and x.shape[2] * x.shape[3] <= MOST_PIXELS_OF_ONE * stride * stride
                    and torch.get_num_threads() > 1
                )
            )
            and stride == step
            and type(padding) is tuple
            and padding[0] == padding[1] < kernel
            and conv.padding_mode == "zeros"
            and conv.groups == 1
            and conv.dilation == (1, 1)
            and conv.bias is None
            and weight.requires_grad
            and weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and x.shape[1] == conv.in_channels
            and x.shape[1] % CHANNEL_TILE == 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and min(x.shape[2], x.shape[3]) + 2 * padding[0] >= kernel
        ):
            y: Tensor = _Convolution.apply(x, weight, stride, padding[0])
            return y
    z: Tensor = conv(x)
    return z


class _Convolution(Node):
    """(x, weight, stride, padding) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.stride, ctx.padding = stride, padding
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return _Convolution.run_untraced(ctx, dy)
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # PyTorch's has a second derivative and batched gradients
        ours = needs_weight and not (torch.is_grad_enabled() or gradients_are_batched(dy))
        dx = dw = None
        if needs_x or not ours:
            stride, padding, mask = [ctx.stride] * 2, [ctx.padding] * 2, [needs_x, needs_weight and not ours, False]
            dx, dw, _ = torch.ops.aten.convolution_backward.default(
                dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
            )
        if ours:
            dy = dy.contiguous(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
            kernel = weight.shape[-1]
            dw = torch.ops.ernet.conv_weight_gradient.default(dy, x, kernel, ctx.stride, ctx.padding)
        return dx, dw, None, None


def _weight_gradient_fake(dy: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    return x.new_empty((dy.shape[1], kernel, kernel, x.shape[1])).permute(0, 3, 1, 2)


if _backend.extension_available():
    torch.library.register_fake("ernet::conv_weight_gradient", _weight_gradient_fake)
