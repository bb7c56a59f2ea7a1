"""What each of two processes must find when statistics are taken over both. Run by test_across_processes.py.

    python two_processes.py RANK FILE     FILE: where the processes meet

Each compares its part with the naive composition of the whole batch in this process alone, in float64.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ernet_fast import ERShortcut
from ernet_fast.er.stage import StageMaps
from ernet_fast.models import ERStage
from ernet_fast.models.resnet import ERResNet

CHANNELS = 5
EVEN, UNEVEN, EMPTY = (2, 2), (1, 4), (3, 0)


class Stage(nn.Module):
    """Blocks of one convolution and one BatchNorm, the one that is fused."""

    def __init__(self, process_group: object = None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(3))
        self.shortcuts = nn.ModuleList(ERShortcut(CHANNELS, i + 1, process_group=process_group) for i in range(3))
        self.fused = True
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        maps = StageMaps(fused=self.fused)
        y = maps.start(x.relu(), self.shortcuts, self.bns)
        total = y
        for conv, bn, shortcut in zip(self.convs, self.bns, self.shortcuts, strict=True):
            y = maps.add(conv(y), bn, shortcut)
            total = total + y
        return total


def parts(sizes: tuple[int, int], layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    """The whole batch, and this process's part of it."""
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn((sum(sizes), CHANNELS, 4, 3), generator=generator, dtype=torch.float64)
    first = sizes[0] if distributed.get_rank() else 0
    part = whole[first : first + sizes[distributed.get_rank()]]
    return (x.contiguous(memory_format=layout).requires_grad_() for x in (whole, part.clone()))


def loss(y: Tensor) -> Tensor:
    return (y.square() * torch.linspace(-1, 1, y.shape[1:].numel(), dtype=y.dtype).view(y.shape[1:])).sum()


def added_up(t: Tensor) -> Tensor:
    t = t.clone()
    distributed.all_reduce(t)
    return t


def compare(
    stage: nn.Module,
    whole_stage: nn.Module,
    sizes: tuple[int, int],
    run: Callable[[nn.Module, Tensor], Tensor] = lambda stage, x: stage(x),
    layout: torch.memory_format = torch.contiguous_format,
    averaged: bool = False,
) -> None:
    """Outputs, gradients of maps and parameters, running statistics."""
    whole, part = parts(sizes, layout)
    expected, found = whole_stage(whole), run(stage, part)
    loss(expected).backward()
    loss(found).backward()
    first = sizes[0] if distributed.get_rank() else 0
    here = slice(first, first + sizes[distributed.get_rank()])
    torch.testing.assert_close(found, expected[here], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(part.grad, whole.grad[here], rtol=1e-8, atol=1e-9)
    wanted = dict(whole_stage.named_parameters())
    for name, parameter in stage.named_parameters():
        name = name.removeprefix("module.")
        if wanted[name].grad is None:
            continue
        gradient = parameter.grad * 2 if averaged else added_up(parameter.grad)
        torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    buffers = dict(whole_stage.named_buffers())
    for name, buffer in stage.named_buffers():
        torch.testing.assert_close(buffer, buffers[name.removeprefix("module.")])


def naive() -> Stage:
    stage = Stage()
    stage.fused = False
    return stage


def synchronised() -> Stage:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Stage())


def check_converted_and_process_group() -> None:
    for sizes in (EVEN, UNEVEN, EMPTY):
        for layout in (torch.contiguous_format, torch.channels_last):
            compare(synchronised(), naive(), sizes, layout=layout)
            compare(Stage(distributed.group.WORLD), naive(), sizes, layout=layout)


def check_modes() -> None:
    """Evaluation takes no statistics; frozen BatchNorms leave those of the shortcuts; cumulative averages."""
    for change in (
        lambda stage: stage.eval(),
        lambda stage: stage.bns.eval(),
        lambda stage: stage.shortcuts.eval(),
        lambda stage: stage.shortcuts[1].eval(),
        lambda stage: [setattr(m, "momentum", None) for m in (*stage.bns, *stage.shortcuts)],
        lambda stage: stage.convs.requires_grad_(False),
    ):
        stage, whole = synchronised(), naive()
        change(stage), change(whole)
        compare(stage, whole, UNEVEN)


def check_distributed_data_parallel() -> None:
    """It averages gradients over the processes. Modules on the CPU that hold nn.SyncBatchNorm it refuses itself."""
    for sizes in (EVEN, UNEVEN):
        for static_graph in (False, True):
            wrapped = DistributedDataParallel(Stage(distributed.group.WORLD), static_graph=static_graph)
            compare(wrapped, naive(), sizes, averaged=True)
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(synchronised())


def check_distributed_data_parallel_without_a_group() -> None:
    """Each process normalises with its own batch, as with nn.BatchNorm2d; gradients are averaged, also accumulated."""
    for steps in (1, 3):
        wrapped = DistributedDataParallel(Stage())
        alone = naive()
        for step in range(steps):
            generator = torch.Generator().manual_seed(7 + 2 * step + distributed.get_rank())
            x = torch.randn(3, CHANNELS, 4, 3, generator=generator, dtype=torch.float64)
            with contextlib.nullcontext() if step == steps - 1 else wrapped.no_sync():
                loss(wrapped(x)).backward()
            loss(alone(x)).backward()
        for found, expected in zip(wrapped.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(found.grad, added_up(expected.grad) / 2, rtol=1e-9, atol=1e-9)


def check_checkpoint() -> None:
    stage, whole = synchronised(), naive()
    for module in (*stage.shortcuts, *stage.bns, *whole.shortcuts, *whole.bns):
        module.momentum = 0.0  # recomputation moves running statistics a second time
    for module in (*stage.shortcuts, *stage.bns):
        module.num_batches_tracked = None
    for module in (*whole.shortcuts, *whole.bns):
        module.num_batches_tracked = None
    compare(stage, whole, UNEVEN, lambda stage, x: checkpoint(stage, x, use_reentrant=False))
    stage.zero_grad(), whole.zero_grad()
    compare(stage, whole, UNEVEN, lambda stage, x: checkpoint(stage, x, use_reentrant=True))


def check_shortcut_alone() -> None:
    class Alone(nn.Module):
        def __init__(self, process_group: object) -> None:
            super().__init__()
            self.shortcut = ERShortcut(CHANNELS, 2, process_group=process_group).double()
            nn.init.uniform_(self.shortcut.weight, generator=torch.Generator().manual_seed(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut([x * 2 + 1, x.relu(), x])

    for sizes in (EVEN, UNEVEN, EMPTY, (1, 1)):
        alone = Alone(None)
        alone.shortcut.fused = False
        compare(Alone(distributed.group.WORLD), alone, sizes)


def freeze_inner(stage: ERStage) -> ERStage:
    """Leave only the last BatchNorms of ER blocks, those that are fused, in training; others see their own batch."""
    last = [block.last_bn for block in list(stage)[1:]]
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module not in last:
            module.eval()
    return stage


def check_er_stage() -> None:
    """The stage of the models, converted or made with a group, eager and compiled."""
    torch.manual_seed(0)
    whole = freeze_inner(ERStage(CHANNELS, 8, 3, fused=False).double())
    group = freeze_inner(ERStage(CHANNELS, 8, 3, process_group=distributed.group.WORLD).double())
    group.load_state_dict(whole.state_dict())
    converted = copy.deepcopy(whole)
    converted.fused = True
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert list(converted.state_dict()) == list(whole.state_dict())
    copied = copy.deepcopy(group)
    assert copied[1].shortcut.process_group is group[1].shortcut.process_group
    compare(copied, copy.deepcopy(whole), UNEVEN)
    restored = pickle.loads(pickle.dumps(group))
    assert restored[1].shortcut.process_group is None
    assert group[1].shortcut.process_group is distributed.group.WORLD
    torch.testing.assert_close(restored.state_dict(), group.state_dict())
    compare(converted, copy.deepcopy(whole), UNEVEN)
    torch._dynamo.reset()
    compare(group, copy.deepcopy(whole), UNEVEN, lambda stage, x: torch.compile(stage, backend="aot_eager")(x))


def check_errors() -> None:
    _, x = parts(EVEN)
    stage = synchronised()
    stage.fused = False
    with pytest.raises(RuntimeError, match="need the fused path: set fused=True"):
        stage(x)
    alone = ERShortcut(CHANNELS, 1, fused=False, process_group=distributed.group.WORLD).double()
    with pytest.raises(RuntimeError, match="need the fused path: set fused=True"):
        alone([x, x])
    mixed = synchronised()
    mixed.bns[1] = nn.BatchNorm2d(CHANNELS).double()
    with pytest.raises(ValueError, match="some blocks of this stage end in nn.SyncBatchNorm"):
        mixed(x)
    partly = Stage(distributed.group.WORLD)
    partly.shortcuts[0].process_group = None
    with pytest.raises(ValueError, match="must share one process group"):
        partly(x)
    one = x[:1, :, :1, :1]
    Stage(distributed.group.WORLD)(one)  # two values a channel in all
    with pytest.raises(ValueError, match=r"of all 2 processes have 1 value\(s\) a channel"):
        Stage(distributed.group.WORLD)(one if distributed.get_rank() == 0 else one[:0])
    with pytest.raises(ValueError, match="process_group has no meaning"):
        ERShortcut(CHANNELS, 1, norm="group", num_groups=1, process_group=distributed.group.WORLD)
    # with group norm the branches' SyncBatchNorms run as they are: torch's own refuse the CPU
    by_sample = ERStage(CHANNELS, 8, 3, norm="group", num_groups=2)
    for block in list(by_sample)[1:]:
        block.bn2 = nn.SyncBatchNorm.convert_sync_batchnorm(block.bn2)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        by_sample(x.float())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ERResNet("basic", (1, 2, 1, 1), 3, base_channels=4))
    with pytest.raises(
        ValueError, match="SyncBatchNorm expected input tensor to be on GPU"
    ):  # torch's own, of the stem
        model(torch.randn(2, 3, 32, 32))
    plain = ERResNet("basic", (1, 2, 1, 1), 3, base_channels=4)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


def main() -> None:
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            distributed.barrier()
            print("passed", name, flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
