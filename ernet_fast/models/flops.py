"""Floating-point operations of a forward pass, counted as multiply-accumulates times two."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models.stage import ERStage


class FlopCount(NamedTuple):
    """Operations of one forward pass: one multiply-accumulate (MAC) counts as two.

    `er_shortcut` has one MAC for each value of each earlier map that a block reads: normalisation and ER weight are
    one scale a channel, and their constants one shift.
    """

    convolution: int
    linear: int
    er_shortcut: int

    @property
    def total(self) -> int:
        """The sum of the three; BatchNorm, ReLU and pooling are not counted, as usual."""
        return self.convolution + self.linear + self.er_shortcut

    @property
    def macs(self) -> int:
        """Multiply-accumulates, half the total."""
        return self.total // 2


def count_flops(model: nn.Module, input_size: Sequence[int] = (1, 3, 224, 224)) -> FlopCount:
    """Floating-point operations (multiply-accumulates x 2) of one forward pass of `model` in evaluation mode.

    Args:
        model: a network with or without ER stages; not run and not modified: a copy without storage is traced.
        input_size: [N, C, H, W], or [C, H, W] for one image.

    Raises:
        ValueError: `input_size` has not 3 or 4 positive entries.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton

    size = tuple(int(n) for n in input_size)
    if len(size) not in (3, 4) or min(size) < 1:
        raise ValueError(f"input_size must be [N, C, H, W] or [C, H, W], got {tuple(input_size)}")
    if len(size) == 3:
        size = (1, *size)
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    traced = copy.deepcopy(model, memo).eval()
    shortcut_macs: list[int] = []

    for module in traced.modules():
        if isinstance(module, ERStage):
            module.fused = False  # the composed path calls each shortcut as a module
        elif isinstance(module, ERShortcut):
            module.register_forward_hook(lambda er, _, y: shortcut_macs.append(er.num_maps * y.numel()))
    dtype = next((p.dtype for p in traced.parameters() if p.is_floating_point()), torch.get_default_dtype())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        traced(torch.empty(size, device="meta", dtype=dtype))
    counts = counter.get_flop_counts()["Global"]
    convolution = sum(flops for operator, flops in counts.items() if "conv" in str(operator))
    return FlopCount(int(convolution), int(sum(counts.values()) - convolution), 2 * sum(shortcut_macs))
