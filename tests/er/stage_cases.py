"""A small stage, its naive composition, losses and comparisons that the tests of stages share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn

from ernet_fast import ERShortcut
from ernet_fast.er import epilogue
from ernet_fast.er.stage import StageMaps

CHANNELS = 6
STEPS = " by steps"
"""Of a stage whose blocks are not one operator each way, as on GPUs."""
NORMS = [("batch", None), ("batch" + STEPS, None), ("group", 1), ("group", 3), ("group" + STEPS, 3)]


@contextlib.contextmanager
def step_by_step(active: bool = True) -> Iterator[None]:
    """Stages that start inside are composed of one operator a step, as on GPUs, if `active`."""
    if not active:
        yield
        return
    with mock.patch.object(epilogue, "block_operator_supports", lambda x, group: False):
        yield


class Stage(nn.Module):
    """Blocks of one convolution each: y_l = ReLU(bn(conv(y_{l-1})) + shortcuts). Returns every y."""

    def __init__(
        self, blocks: int = 4, norm: str = "batch", num_groups: int | None = None, bn: type[nn.Module] = nn.BatchNorm2d
    ):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(blocks))
        self.bns = nn.ModuleList(bn(CHANNELS) for _ in range(blocks))
        self.shortcuts = nn.ModuleList(
            ERShortcut(CHANNELS, i + 1, norm=norm.removesuffix(STEPS), num_groups=num_groups) for i in range(blocks)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)
        self.fused, self.whole = True, not norm.endswith(STEPS)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = StageMaps(fused=self.fused)
        with step_by_step(not self.whole):
            y = maps.start(x.relu(), self.shortcuts)
        outputs = [y]
        for conv, bn, shortcut in zip(self.convs, self.bns, self.shortcuts, strict=True):
            y = maps.add(conv(y), bn, shortcut)
            outputs.append(y)
        return outputs


def pair(**options) -> tuple[Stage, Stage]:
    torch.manual_seed(3)
    fused = Stage(**options).double()
    naive = copy.deepcopy(fused)
    naive.fused = False
    return fused, naive


def picture(seed: int = 0, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    x = torch.randn((3, CHANNELS, 7, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=layout).requires_grad_()


def gradients(stage: Stage, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"x": x.grad, **{name: p.grad for name, p in stage.named_parameters()}}
    return {name: g for name, g in found.items() if g is not None}


def assert_same(fused: Stage, naive: Stage, x: torch.Tensor, y: torch.Tensor) -> None:
    actual, expected = gradients(fused, x), gradients(naive, y)
    assert actual.keys() == expected.keys() and actual
    for name, g in expected.items():
        torch.testing.assert_close(
            actual[name], g, rtol=1e-9, atol=1e-10 * float(g.norm()), msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(dict(fused.named_buffers()), dict(naive.named_buffers()))


def loss_of_last(ys):
    return (ys[-1] * torch.linspace(-1, 1, ys[-1].numel(), dtype=ys[-1].dtype).view_as(ys[-1])).sum()


def loss_of_middle(ys):
    return ys[2].square().sum()


def loss_of_all(ys):
    return sum(((i + 1) * y).square().mean() for i, y in enumerate(ys))


class Tails(nn.Module):
    """What a stage does with maps that are given: last BatchNorm, shortcuts, sum, ReLU. Returns every y, stacked."""

    def __init__(
        self, num_maps: int, norm: str = "batch", num_groups: int | None = None, channels: int = CHANNELS
    ) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(num_maps - 1))
        self.shortcuts = nn.ModuleList(
            ERShortcut(channels, i + 1, norm=norm.removesuffix(STEPS), num_groups=num_groups)
            for i in range(num_maps - 1)
        )
        generator = torch.Generator().manual_seed(num_maps)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        for name, buffer in self.named_buffers():  # running statistics worth using
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))
        self.fused, self.whole = True, not norm.endswith(STEPS)

    def forward(self, *zs: torch.Tensor) -> torch.Tensor:
        maps = StageMaps(fused=self.fused)
        with step_by_step(not self.whole):
            ys = [maps.start(zs[0], self.shortcuts, self.bns)]
        ys += [maps.add(z, bn, shortcut) for z, bn, shortcut in zip(zs[1:], self.bns, self.shortcuts, strict=True)]
        return torch.stack(ys)


def tails(num_maps: int, norm: str = "batch", num_groups: int | None = None) -> tuple[Tails, Tails]:
    """Fused ones in float64, and the naive composition with the same parameters."""
    fused = Tails(num_maps, norm, num_groups).double()
    naive = copy.deepcopy(fused)
    naive.fused = False
    return fused, naive
