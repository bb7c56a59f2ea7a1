"""What does an ER stage keep for backward, and need at its peak, beyond a plain residual stage?

One row is a whole stage of a network, float32, channels-last, the same convolutions in all, in training mode. Bytes are
those of tensors, by the allocator (`tensor_memory.py`): what is in use after forward, its result included, and the
most during forward + backward. `extra_*` is what there is beyond the plain stage, `extra_per_image` how much of it
another image adds: vectors of channels do not grow with the batch, maps do. `lean` is the fused stage with
memory="lean", whose backward computes maps again.

Run: python3 dev.py bench bench_er_memory
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from er_networks import FUSED
from er_stage_epilogues import STAGES
from tensor_memory import MemoryUse, memory_use
from this_tree import rival_networks
from torch import Tensor, nn

from ernet_fast.er.lean import lean_memory

BATCH = 8


class Lean(nn.Module):
    """A stage as a network with memory="lean" runs it."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        with lean_memory():
            return self.stage(x)


def stages(name: str) -> dict[str, nn.Module]:
    """The stage `name`, such as "resnet50-1", of the plain ResNet, and of the ER-ResNet naive, fused and lean."""
    depth, index = int(name.removeprefix("resnet").split("-")[0]), int(name[-1]) - 1
    fused = FUSED[depth]().stages[index]
    naive = copy.deepcopy(fused)
    naive.fused = False
    lean = Lean(copy.deepcopy(fused))
    found = {
        "plain": rival_networks.PlainResNet(depth).get_submodule(f"layer{index + 1}"),
        "naive": naive,
        "fused": fused,
        "lean": lean,
    }
    return {who: stage.to(memory_format=torch.channels_last) for who, stage in found.items()}


def input_of(stage: nn.Module, name: str, batch: int) -> Tensor:
    size = STAGES[name].size * (2 if name[-1] != "1" else 1)
    channels = next(module for module in stage.modules() if isinstance(module, nn.Conv2d)).in_channels
    x = torch.randn((batch, channels, size, size), generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def forward_and_backward(stage: nn.Module, x: Tensor) -> None:
    """One pass; gradients are left in x and the parameters."""
    stage.zero_grad(set_to_none=True)
    x.grad = None
    y = stage(x)
    y.backward(torch.ones_like(y))


def uses(stage: nn.Module, x: Tensor) -> tuple[MemoryUse, MemoryUse]:
    """Of forward alone, and of forward + backward with gradients that are there already."""
    both: Callable[[], None] = functools.partial(forward_and_backward, stage, x)
    both()
    stage.zero_grad(set_to_none=True)
    x.grad = None
    return memory_use(functools.partial(stage, x)), memory_use(both)


@pytest.mark.parametrize("stage", list(STAGES))
def test_stage_memory(record_row, torch_threads, stage):
    torch_threads(2)
    kept: dict[str, list[int]] = {}
    peaks: dict[str, int] = {}
    for who, module in stages(stage).items():
        measured = [uses(module, input_of(module, stage, batch)) for batch in (BATCH // 2, BATCH)]
        kept[who] = [forward.kept for forward, _ in measured]
        peaks[who] = measured[-1][1].peak
    channels, size, num_maps = STAGES[stage]
    extra = {who: [own - plain for own, plain in zip(kept[who], kept["plain"], strict=True)] for who in kept}
    per_image = {who: (few - many) / (BATCH // 2 - BATCH) for who, (few, many) in extra.items()}
    record_row(
        "memory of a stage in training", *3 * [kept["fused"][1] / 2**20], unit="MiB", repeats=1, peer="plain stage",
        peer_p50=kept["plain"][1] / 2**20, **{f"kept_{who}": values[1] for who, values in kept.items()},
        **{f"peak_{who}": value for who, value in peaks.items()}, extra_fused=extra["fused"][1],
        extra_vectors=extra["fused"][1] / (4 * channels),
        extra_maps_naive=extra["naive"][1] / (4 * BATCH * channels * size**2), extra_per_image=per_image["fused"],
        extra_per_image_naive=per_image["naive"], peak_share=peaks["fused"] / peaks["plain"],
        lean_kept_share=kept["lean"][1] / kept["plain"][1], lean_peak_share=peaks["lean"] / peaks["plain"],
        pairs=num_maps * (num_maps - 1) // 2, blocks=num_maps - 1,
        target=["extra_per_image <= 0", "peak_share <= 1.05"],
    )  # fmt: skip
