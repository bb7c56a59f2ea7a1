"""Statistics of BatchNorm over all processes, on the CPU too, where torch's SyncBatchNorm does not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from ernet_fast.er.process_group import ProcessGroup, active_group
from ernet_fast.models.blocks import ERBlock


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor, in all of them; so is that of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        total = dy.clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """What `nn.SyncBatchNorm` does, of maps on the CPU, by collectives that gradients flow through."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised maps [N, C, H, W]; in training by mean and variance over the maps of all processes."""
        group = active_group(distributed.group.WORLD) if self.training else None
        if group is None:
            return super().forward(input)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        x = input if input.dtype == torch.float64 else input.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        distributed.all_reduce(count, group=group)
        # two passes: the squares of deviations lose nothing where the mean is large
        mean = _SumOverProcesses.apply(x.double().sum(dims), group) / count
        deviation = x.double() - mean.view(shape)
        var = _SumOverProcesses.apply(deviation.square().sum(dims), group) / count
        if self.track_running_stats:
            self._update(mean.detach(), var.detach(), float(count))
        scale = torch.rsqrt(var + self.eps).view(shape)
        out = (deviation * scale).to(x.dtype)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Running statistics, with the unbiased variance, as torch keeps them."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var.dtype), share)


def synchronise_norms(network: nn.Module, device: torch.device, *, timm: bool = False) -> nn.Module:
    """The network with every BatchNorm's statistics taken over all processes; may be another object.

    On CUDA devices every BatchNorm becomes `nn.SyncBatchNorm`, with which ER stages synchronise too. On the CPU, where
    DistributedDataParallel refuses those, ER shortcuts get a process group, and the BatchNorms that are not fused with
    them become `CPUSyncBatchNorm`. Names of parameters and buffers stay.

    Raises:
        ValueError: a timm model on the CPU, whose BatchNorms may hold their activation.
    """
    if timm:
        if device.type == "cpu":
            raise ValueError("sync_batchnorm=True is not offered for timm models on the CPU; train them without it.")
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    in_stages: set[int] = set()
    for block in network.modules():
        if isinstance(block, ERBlock) and block.shortcut.norm == "batch":  # norm="group" is of one sample
            block.shortcut.process_group = distributed.group.WORLD
            in_stages |= {id(block.last_bn), *(id(inner) for inner in block.shortcut.modules())}
    for module in network.modules():
        if type(module) is nn.BatchNorm2d and id(module) not in in_stages:
            module.__class__ = CPUSyncBatchNorm  # the same parameters and buffers, under the same names
    return network
