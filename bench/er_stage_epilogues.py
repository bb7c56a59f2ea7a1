"""The block epilogues of a stage - last BatchNorm, shortcuts, sum, ReLU - alone, and the bytes that they must move.

The reads and writes of one feature map in forward + backward of a stage of L maps, in the fused design:

    forward   of block l      z_0 ... z_l, y_l:  l + 2
    backward  of map i >= 1   dy_i, y_i, z_i, dz_i, and the dy of the blocks after:  4 + (L - 1 - i)
              of x_0          x_0, dx_0, what it gets from the branch of block 1, and L - 1 dy:  L + 2

with l = 1 ... L - 1, where all of it is done channel tile by channel tile (contiguous maps). Channels-last, passes go
over whole maps, and some are read twice: forward every map, for its moments; backward dy_i and z_i, for the inner
products and for dz_i; and z_{i-1} is read beside the dy, whose inner products with it are needed next: 3 more.

Of the package this file and `er_networks.py` use public names alone, so that they run on other revisions too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from er_branch import branch, give
from torch import Tensor, nn

from ernet_fast.models import ERStage
from ernet_fast.models.blocks import ERBottleneck, ProjectionBottleneck


class StageShape(NamedTuple):
    """The maps of a stage: their channels C, height = width, and how many there are, L."""

    channels: int
    size: int
    num_maps: int


# the four stages of ER-ResNet-50, and the third of ER-ResNet-101 (its others are those of the 50-layer net)
STAGES = {
    "resnet50-1": StageShape(256, 56, 3),
    "resnet50-2": StageShape(512, 28, 4),
    "resnet50-3": StageShape(1024, 14, 6),
    "resnet50-4": StageShape(2048, 7, 3),
    "resnet101-3": StageShape(1024, 14, 23),
}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
QUICK = 8  # batch of the rows that are not slow


def cases(stages: tuple[str, ...] = tuple(STAGES)) -> list[object]:
    """Every stage, batch, layout and number of threads; those of other batches than QUICK are marked slow."""
    import pytest  # which benches on a GPU do without

    return [
        pytest.param(stage, batch, layout, threads, marks=[] if batch == QUICK else [pytest.mark.slow])
        for stage in stages
        for batch in (8, 16)
        for layout in LAYOUTS
        for threads in (1, 2)
    ]


class EpilogueMaps(NamedTuple):
    """Maps and gradients for the epilogues of a stage."""

    zs: list[Tensor]
    """x_0, and the outputs z_1 ... z_{L-1} of the branches' last convolutions."""
    dys: list[Tensor]
    """The gradients that y_0 ... y_{L-2} get from the next block's branch, and that of y_{L-1}."""

    @property
    def map_bytes(self) -> int:
        return self.zs[0].numel() * self.zs[0].element_size()


def make_maps(
    shape: StageShape, batch: int, layout: torch.memory_format = torch.channels_last, *,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> EpilogueMaps:  # fmt: skip
    """Random maps of a stage; x_0 is after its ReLU."""
    generator = torch.Generator(device).manual_seed(0)

    def one_map() -> Tensor:
        size = (batch, shape.channels, shape.size, shape.size)
        return torch.randn(size, generator=generator, dtype=dtype, device=device).contiguous(memory_format=layout)

    zs = [one_map() for _ in range(shape.num_maps)]
    zs[0].relu_().requires_grad_()
    return EpilogueMaps(zs, [one_map() for _ in range(shape.num_maps)])


class _Opening(ProjectionBottleneck):
    def forward(self, x: Tensor, *, fused: bool = True) -> Tensor:
        """The input, which is x_0 already."""
        return x


class _Block(ERBottleneck):
    def branch(self, x: Tensor, *, fused: bool = True) -> Tensor:
        """The map that `give` was told of, as though it were computed from x."""
        return branch(x, len(self.shortcut.weight))


class EpilogueStage(ERStage):
    """A stage whose convolutions move no bytes: what is left are the epilogues of its blocks.

    `fused` in one pass a block, else the naive composition.
    """

    def __init__(self, channels: int, num_maps: int, *, fused: bool = True) -> None:
        super().__init__(channels, channels, 1, width=1, fused=fused)
        self.add_module("0", _Opening(channels, 1, channels))
        for index in range(1, num_maps):
            self.add_module(str(index), _Block(channels, index, width=1, fused=fused))

    def naive(self) -> EpilogueStage:
        other = copy.deepcopy(self)
        other.fused = False
        return other


def train_epilogues(stage: nn.Module, maps: EpilogueMaps) -> None:
    """Forward and backward of a stage's epilogues; gradients are left in x_0 and the parameters."""
    for index, z in enumerate(maps.zs[1:], start=1):
        give(index, z, maps.dys[index - 1])
    for tensor in (maps.zs[0], *stage.parameters()):
        tensor.grad = None
    stage(maps.zs[0]).backward(maps.dys[-1])


def steps_of(stages: dict[str, nn.Module], maps: EpilogueMaps) -> dict[str, Callable[[], None]]:
    """A training pass of each stage on these maps."""
    return {name: functools.partial(train_epilogues, stage, maps) for name, stage in stages.items()}


def map_accesses(num_maps: int, *, tiled: bool) -> int:
    """Reads and writes of one map that the fused design makes in forward + backward; see the module's docstring."""
    blocks = range(1, num_maps)
    once = sum(block + 2 for block in blocks) + sum(4 + num_maps - 1 - i for i in blocks) + num_maps + 2
    return once if tiled else once + num_maps + 3 * len(blocks)


def maps_touched(num_maps: int) -> int:
    """How many maps there are in a pass, its working set: z, dy and dz of every map, and y of every block."""
    return 4 * num_maps - 1
