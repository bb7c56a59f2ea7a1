"""Statistics of BatchNorm over all processes of a run, on the CPU too, where torch's SyncBatchNorm has none."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce

from ernet_fast.er.process_group import group_of
from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models.blocks import ERBlock


class CPUSyncBatchNorm(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` of maps on the CPU: the same result, by collectives that gradients flow through."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised maps [N, C, ...]; in training by mean and variance over the maps of all processes."""
        group = group_of(self) if self.training else None
        if group is None or input.device.type != "cpu":
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input if input.dtype == torch.float64 else input.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        distributed.all_reduce(count, group=group)
        # two passes: the squares of deviations lose nothing where the mean is large
        mean = all_reduce(x.double().sum(dims), group=group) / count
        deviation = x.double() - mean.view(shape)
        var = all_reduce(deviation.square().sum(dims), group=group) / count
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

    ER stages synchronise by themselves where their BatchNorms are `nn.SyncBatchNorm`; on the CPU the others become
    `CPUSyncBatchNorm`.

    Raises:
        ValueError: a timm model on the CPU, whose BatchNorms may hold their activation.
    """
    if timm:
        if device.type == "cpu":
            raise ValueError("sync_batchnorm=True is not offered for timm models on the CPU; train them without it.")
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if device.type != "cpu":
        return network
    in_stages = {id(block.last_bn) for block in network.modules() if isinstance(block, ERBlock)}
    for module in list(network.modules()):
        if isinstance(module, ERShortcut):
            in_stages |= {id(inner) for inner in module.modules()}
    for module in network.modules():
        if type(module) is nn.SyncBatchNorm and id(module) not in in_stages:
            module.__class__ = CPUSyncBatchNorm  # the same parameters and buffers, under the same names
    return network
