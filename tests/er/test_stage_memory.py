"""What a fused stage keeps, moves and needs at its peak, against a plain residual stage of torch modules."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from er_kernel_counts import profiled_kernels
from er_networks import train_step
from er_stage_epilogues import EpilogueStage, StageShape, make_maps, map_accesses, train_epilogues
from tensor_memory import held_bytes, memory_use, training_peak
from this_tree import rival_networks
from torch import Tensor, nn
from traffic import bytes_moved

from ernet_fast import er_resnet50
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.er.stage import StageMaps

CHANNELS = 8
DTYPES = [torch.float32, torch.bfloat16]


class PlainStage(nn.Module):
    """Blocks of one convolution: y_l = ReLU(bn(conv(y_{l-1})) + y_{l-1})."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(blocks))
        self.bns = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(blocks))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, y: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            out = bn(conv(y))
            out += y
            y = self.relu(out)
        return y


class ShortcutStage(PlainStage):
    """The same blocks with ER shortcuts."""

    def __init__(self, blocks: int, *, fused: bool = True, num_groups: int | None = None) -> None:
        super().__init__(blocks)
        norm = "batch" if num_groups is None else "group"
        self.shortcuts = nn.ModuleList(
            ERShortcut(CHANNELS, index + 1, norm=norm, num_groups=num_groups) for index in range(blocks)
        )
        self.fused = fused

    def forward(self, y: Tensor) -> Tensor:
        maps = StageMaps(fused=self.fused)
        y = maps.start(y, self.shortcuts)
        for conv, bn, shortcut in zip(self.convs, self.bns, self.shortcuts, strict=True):
            y = maps.add(conv(y), bn, shortcut)
        return y


def with_half_maps(stage: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convolutions in `dtype`, so that all maps are; normalisations keep their float32 parameters."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    return stage


def image(size: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, CHANNELS, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def kept_for_backward(stage: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd saves, the parameters' and the input's left out."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(x)
    known = {tensor.untyped_storage()._cdata for tensor in (x, *stage.parameters(), *stage.buffers())}
    return held_bytes(tensor for tensor in saved if tensor.untyped_storage()._cdata not in known)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_groups", [None, 2])
@pytest.mark.parametrize("measure", ["saved tensors", "allocator"])
def test_activations_are_those_of_a_plain_stage_but_for_channel_vectors(measure, num_groups, dtype):
    """The extra memory must not grow with the maps' size at all, and be a handful of vectors a pair.

    A plain stage keeps z_l and y_l of each block, so nothing but these is kept. With group norm (`num_groups`) the
    vectors are those of each sample.
    """
    blocks, extra = 4, []
    for size in (12, 24):
        x = image(size, dtype)
        kept = []
        for stage in (PlainStage(blocks), ShortcutStage(blocks, num_groups=num_groups)):
            with_half_maps(stage, dtype)(x)  # the first call may allocate for good
            forward = functools.partial(stage, x)
            kept.append(kept_for_backward(stage, x) if measure == "saved tensors" else memory_use(forward).kept)
        extra.append(kept[1] - kept[0])
    pairs = blocks * (blocks + 1) // 2
    assert extra[0] == extra[1]
    samples = 1 if num_groups is None else x.shape[0]
    assert extra[0] <= 16 * (pairs + blocks) * samples * CHANNELS * 4


def test_the_naive_stage_keeps_more():
    """That the measure above sees what it should: the naive composition keeps a normalised map for every pair."""
    blocks, size = 4, 24
    x = image(size, torch.float32)
    naive, plain = (kept_for_backward(stage, x) for stage in (ShortcutStage(blocks, fused=False), PlainStage(blocks)))
    assert naive - plain >= blocks * (blocks + 1) // 2 * x.numel() * 4


@pytest.mark.parametrize("num_maps", [2, 3, 6])
def test_a_stage_moves_what_the_design_counts(num_maps):
    """Bytes that forward + backward move for each byte of a map: autograd accumulates and copies nothing besides."""
    moved, map_bytes = [], []
    for size in (6, 12):
        maps = make_maps(StageShape(CHANNELS, size, num_maps), 2)
        stage = EpilogueStage(CHANNELS, num_maps)
        train_epilogues(stage, maps)
        moved.append(bytes_moved(functools.partial(train_epilogues, stage, maps), ("ernet_bench::",)))
        map_bytes.append(maps.map_bytes)
    bits = 8 * math.ceil(CHANNELS / 64) / (4 * CHANNELS)  # of a map: those of a pixel's channels
    blocks = range(1, num_maps)  # each also reads the map before in backward
    accesses = map_accesses(num_maps, tiled=True) + len(blocks) + bits * sum(1 + block for block in blocks)
    assert moved[1] - moved[0] <= accesses * (map_bytes[1] - map_bytes[0])


@pytest.mark.parametrize("num_maps", [2, 4])
def test_kernels_of_a_stage(num_maps):
    """One pass over maps for the moments and the gradient of each map, and for the sum and the dot of each block."""
    maps = make_maps(StageShape(CHANNELS, 9, num_maps), 2)
    fused = EpilogueStage(CHANNELS, num_maps)
    size = maps.zs[0].numel()
    own = profiled_kernels(functools.partial(train_epilogues, fused, maps), size)
    naive = profiled_kernels(functools.partial(train_epilogues, fused.naive(), maps), size)
    assert 0 < own.map <= 2 * num_maps + 2 * (num_maps - 1)
    pairs = num_maps * (num_maps - 1) // 2
    assert naive.map >= 7 * pairs  # norm, product, sum; product, product, reduction, norm backward


def test_peak_of_a_training_step():
    """At most 1.05 times that of a plain ResNet of torch modules."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 96, 96), torch.randint(0, 10, (4,))
    peaks = []
    for model in (rival_networks.PlainResNet(50, 10, base_channels=16), er_resnet50(10, base_channels=16)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        step = functools.partial(train_step, model, optimizer, images, labels)
        step()
        peaks.append(training_peak(model, optimizer, step))
    plain, fused = peaks
    assert fused <= 1.05 * plain
