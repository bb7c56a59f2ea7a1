"""Floating-point operations of a forward pass (multiply-accumulates times two), and the table of the networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models.depths import FAMILY, LAYERS
from ernet_fast.models.resnet import ERResNet
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
    size = (1, *size)[-4:]
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


PAPER_FLOPS = {18: 3.4e9, 34: 6.2e9, 50: 7.8e9, 101: 9.2e9}
"""The FLOPs column of the ERNet paper (Chandana Mani & Kamalakannan, ELCVIA), Table 1."""


def architecture_table(num_classes: int = 1000, image_size: int = 224) -> str:
    """Markdown: parameters and operations of each network for an image of `image_size` pixels squared, beside the
    figures of the ERNet paper.
    """
    rows = [
        "| network | block | blocks a stage | parameters | of them ER weights | GFLOPs (2 x MAC) | of them ER sums "
        "| paper, GFLOPs |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for block in ("standard", "er133"):
        for depth, layers in LAYERS.items():
            with torch.device("meta"):
                model = ERResNet(FAMILY[depth], layers, num_classes, block=block)
            flops = count_flops(model, (1, 3, image_size, image_size))
            sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
            weights = sum(size for name, size in sizes.items() if ".shortcut." in name)
            paper = f"{PAPER_FLOPS[depth] / 1e9:.1f}" if block == "standard" and depth in PAPER_FLOPS else "–"
            rows.append(
                f"| `er_resnet{depth}` | {block} | {', '.join(map(str, layers))} | {sum(sizes.values()):,} "
                f"| {weights:,} | {flops.total / 1e9:.2f} | {flops.er_shortcut / 1e9:.3f} | {paper} |"
            )
    return "\n".join(rows)
