"""How fast are BatchNorm + ReLU, and a projection block's two BatchNorms, sum and ReLU, against PyTorch's modules?

One row is forward + backward in training of every such pass of one stage of ER-ResNet-50 (or of its stem), maps given,
one after the other. `copy_time` counts, as `er_stage_epilogues.py` does for blocks, the reads and
writes of a map

    BatchNorm, ReLU              forward z, y;      backward dy, y, z, dz                        6
    two BatchNorms, sum, ReLU    forward z, s, y;   backward dy, y, z, dz, and dy, s, ds        10

where all of it is done channel tile by channel tile (contiguous maps). Channels-last, passes go over whole
maps: each input is read once more for its moments, dy and z once more for dz, and s once more for its inner products:
3 and 5.

Run: python3 dev.py bench bench_er_norms        batch 8
     with --slow batch 16 too
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from contestants import contestants
from copy_floor import copy_time
from er_stage_epilogues import LAYOUTS, QUICK, map_accesses
from torch import Tensor, nn

from ernet_fast.er.norm_relu import batch_norm_relu, projection_sum

# of ER-ResNet-50, images of 224 x 224: maps of BatchNorm + ReLU (channels, size, how many), and of the projection
INNER = {
    "stem": [(64, 112, 1)],
    "resnet50-1": [(64, 56, 6)],
    "resnet50-2": [(128, 56, 1), (128, 28, 7)],
    "resnet50-3": [(256, 28, 1), (256, 14, 11)],
    "resnet50-4": [(512, 14, 1), (512, 7, 5)],
}
PROJECTION = {"resnet50-1": (256, 56), "resnet50-2": (512, 28), "resnet50-3": (1024, 14), "resnet50-4": (2048, 7)}
GROUP = "BatchNorm + ReLU, forward + backward"
CASES = [*((name, "norm, relu") for name in INNER), *((name, "projection") for name in PROJECTION)]


class Pass:
    """One pass with its maps: `num_maps` inputs, their BatchNorms, sum, ReLU."""

    def __init__(self, channels: int, size: int, batch: int, layout: torch.memory_format, num_maps: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def one_map() -> Tensor:
            values = torch.randn((batch, channels, size, size), generator=generator)
            return values.contiguous(memory_format=layout)

        self.zs, self.dy = [one_map().requires_grad_() for _ in range(num_maps)], one_map()
        self.bns = [nn.BatchNorm2d(channels) for _ in range(num_maps)]
        self.relu = nn.ReLU(inplace=True)
        self.bytes = self.dy.numel() * self.dy.element_size()

    def accesses(self, *, tiled: bool) -> int:
        """Reads and writes of one map in forward + backward, see the module's docstring."""
        if len(self.zs) == 1:
            return 6 if tiled else 9
        return map_accesses(2, tiled=tiled) - 1  # a stage of two maps whose x_0 has no other gradient

    def _train(self, y: Tensor) -> None:
        y.backward(self.dy)
        for tensor in (*self.zs, *(p for bn in self.bns for p in bn.parameters())):
            tensor.grad = None

    def modules(self) -> None:
        first, *others = (bn(z) for bn, z in zip(self.bns, self.zs, strict=True))
        self._train(self.relu(functools.reduce(torch.add, others, first)))

    def fused(self) -> None:
        pairs = [part for pair in zip(self.zs, self.bns, strict=True) for part in pair]
        self._train((batch_norm_relu if len(self.zs) == 1 else projection_sum)(*pairs, self.relu))


def passes(name: str, kind: str, batch: int, layout: torch.memory_format) -> list[Pass]:
    if kind == "projection":
        return [Pass(*PROJECTION[name], batch, layout, 2)]
    return [Pass(channels, size, batch, layout, 1) for channels, size, count in INNER[name] for _ in range(count)]


@contestants("fused", "modules")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("batch", [QUICK, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_norms(interleave, record_row, torch_threads, name, kind, batch, layout, threads, who):
    torch_threads(threads)
    all_passes = passes(name, kind, batch, LAYOUTS[layout])

    def all_of(way: Callable[[Pass], None]) -> None:
        for one in all_passes:
            way(one)

    steps = {name: functools.partial(all_of, way) for name, way in (("fused", Pass.fused), ("modules", Pass.modules))}
    figures = interleave(lambda: steps, rounds=11, budget=1.2).figures("fused")
    if who != "fused":
        return
    tiled = layout == "contiguous"
    must_move = sum(one.accesses(tiled=tiled) * one.bytes for one in all_passes)
    working_set = sum((2 * len(one.zs) + 2) * one.bytes for one in all_passes)
    record_row(
        GROUP, **figures, peer="PyTorch's modules", peer_p50=figures["modules_ms"],
        **copy_time(must_move, working_set, "the passes"), passes=len(all_passes),
    )  # fmt: skip
