"""Statistics of maps that are spread over the processes of a group: collectives of C-vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

ProcessGroup = Any  # torch.distributed.ProcessGroup, which builds of PyTorch without distributed lack


NO_NAIVE_GROUP = (
    "statistics across processes (nn.SyncBatchNorm, process_group) need the fused path: set fused=True, ask "
    "`ernet-fast doctor` why there are no compiled operators, or take the process group away."
)


def active_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """`group` if it holds processes besides this one, else None."""
    if group is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    return group if distributed.get_world_size(group) > 1 else None


def group_of(bn: torch.nn.SyncBatchNorm) -> ProcessGroup | None:
    """The group over which `bn` takes its statistics in training, None where that is this process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return active_group(bn.process_group or distributed.group.WORLD)


def gather_moments(mean: Tensor, var: Tensor, elements: int, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Moments over all processes from those of each, by one collective of 2 C + 1 numbers.

    Args:
        mean: mean of this process's values [C].
        var: their biased variance; anything where there are none.
        elements: how many values a channel this process has, 0 included.
        group: the processes, all of which call this in the same order.

    Returns:
        Mean and biased variance [C] in the dtype of `mean`, and the float64 number of values [1].

    Raises:
        ValueError: on the CPU, if all processes together have less than two values a channel.
    """
    channels = mean.shape[0]
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64, device=mean.device)
    if elements:
        mine[:channels] = mean
        mine[channels : 2 * channels] = var.double() * elements
        mine[-1] = elements
    world = distributed.get_world_size(group)
    everyone = mine.new_empty((world, 2 * channels + 1))
    # its name from torch 2.13 on, and before
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(everyone.view(-1), mine, group=group)
    means, squares, counts = everyone[:, :channels], everyone[:, channels:-1], everyone[:, -1:]
    count = counts.sum(0)
    if count.device.type == "cpu" and float(count) < 2:
        raise ValueError(
            f"the maps of all {world} processes have {int(count)} value(s) a channel: BatchNorm cannot train on them. "
            "Use larger batches or images, or eval()."
        )
    total = (counts * means).sum(0) / count
    # Chan, Golub and LeVeque: squared deviations from the common mean
    deviations = squares.sum(0) + (counts * (means - total).square()).sum(0)
    return total.to(mean.dtype), (deviations / count).to(var.dtype), count
