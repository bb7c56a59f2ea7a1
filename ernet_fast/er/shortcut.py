"""The weights of one block's shortcuts, as a module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ernet_fast.er import operators
from ernet_fast.er.arguments import check_eps, check_momentum, check_norm, check_shortcut_sum
from ernet_fast.er.coefficients import ShortcutArguments
from ernet_fast.er.epilogue_composed import one_call_serves
from ernet_fast.er.functional import batch_shortcut_sum, er_shortcut_sum
from ernet_fast.er.process_group import NO_NAIVE_GROUP, ProcessGroup, active_group
from ernet_fast.er.unfused_coefficients import MapStatistics, momentum_of, shortcut_coefficients, update_running
from ernet_fast.reference.er import er_shortcut_sum as reference_shortcut_sum


class ERShortcut(nn.Module):
    """`y = ReLU(x_l + sum_i w_i * N(x_i))` over the maps x_0 ... x_{l-1} of earlier blocks.

    Equation (10) of the ERNet paper. `w_i` is a vector of channel weights, 1 at first; N normalises a map to zero mean
    and unit variance without affine parameters.

    Parameters and buffers:
        weight: [num_maps, channels], float32.
        running_mean, running_var: [num_maps, channels], with norm="batch"; used in evaluation mode.
        num_batches_tracked: as in `nn.BatchNorm2d`, with norm="batch".
    """

    def __init__(
        self,
        channels: int,
        num_maps: int,
        *,
        norm: str = "batch",
        num_groups: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        relu: bool = True,
        fused: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Make the shortcuts of one block.

        Args:
            channels: C of the maps.
            num_maps: how many earlier maps there are, >= 1.
            norm: "batch" (statistics per channel over N, H and W, running statistics in evaluation) or "group" (per
                sample and group of channels).
            num_groups: with norm="group": 1 is layer norm, `channels` instance norm.
            eps: added to variances, > 0.
            momentum: of the running statistics, from 0 to 1; None for a cumulative average.
            relu: apply the ReLU.
            fused: use the fused operators where they serve; False is the naive composition.
            process_group: with norm="batch", the processes of `torch.distributed` over whose batches together the
                statistics are taken in training, as in `nn.SyncBatchNorm`; such as `torch.distributed.group.WORLD`.
                None for this process alone. It needs the fused path. Not part of the state, and not pickled.

        Raises:
            TypeError: a size, eps or momentum that is no number.
            ValueError: an argument out of range, or num_groups that does not fit.
        """
        super().__init__()
        for name, size in (("channels", channels), ("num_maps", num_maps)):
            if not isinstance(size, int):
                raise TypeError(f"{name} is {size!r}; expected an int.")
        if channels < 1 or num_maps < 1:
            raise ValueError(f"channels={channels} and num_maps={num_maps} must both be at least 1.")
        check_norm(norm, num_groups, channels)
        check_eps(eps)
        if momentum is not None:
            check_momentum(momentum)
        self.channels, self.num_maps = channels, num_maps
        self.norm, self.num_groups = norm, num_groups
        if norm == "group" and process_group is not None:
            raise ValueError("process_group has no meaning with norm='group', whose statistics are of one sample.")
        self.eps, self.momentum, self.relu, self.fused = eps, momentum, relu, fused
        self.process_group = process_group
        self.weight = nn.Parameter(torch.ones(num_maps, channels))
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        batch = norm == "batch"
        self.register_buffer("running_mean", torch.zeros(num_maps, channels) if batch else None)
        self.register_buffer("running_var", torch.ones(num_maps, channels) if batch else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if batch else None)

    def reset_parameters(self) -> None:
        """Set weights to 1 and running statistics to those of nothing seen."""
        nn.init.ones_(self.weight)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def extra_repr(self) -> str:
        """The arguments, for print."""
        groups = "" if self.num_groups is None else f", num_groups={self.num_groups}"
        return f"{self.channels}, num_maps={self.num_maps}, norm={self.norm!r}{groups}, fused={self.fused}"

    def normalises_with_batch(self) -> bool:
        """True if N takes the statistics of the batch at hand: batch norm in training mode."""
        return self.norm == "batch" and self.training

    def check_maps_filed(self, filed: int, z: Tensor) -> None:
        """Raise ValueError unless `filed` maps of the channels of `z` are what the weights are for."""
        if filed != self.num_maps or z.shape[1] != self.channels:
            raise ValueError(
                f"ERShortcut has weights for {self.num_maps} earlier maps of {self.channels} channels; "
                f"got {filed} maps of {z.shape[1]} channels."
            )

    def forward(self, xs: Sequence[Tensor], *, fused: bool | None = None) -> Tensor:
        """Apply the shortcuts.

        Args:
            xs: num_maps + 1 maps [N, C, H, W]; the last is the output of this block's branch.
            fused: overrides the module's own setting.

        Returns:
            [N, C, H, W], in the dtype and layout of the maps.

        Raises:
            TypeError, ValueError: maps that do not fit, see `er_shortcut_sum`; no statistics have been moved then.
        """
        fused = self.fused if fused is None else fused
        group = active_group(self.process_group) if self.normalises_with_batch() else None
        if group is not None:
            return self._forward_across_processes(xs, fused, group)
        running = self.running_mean, self.running_var
        momentum = 0.0 if self.momentum is None else self.momentum
        check_shortcut_sum(
            xs, self.weight, self.norm, self.num_groups, *running, self.training, momentum=momentum, eps=self.eps
        )
        if fused and self.norm == "batch" and one_call_serves(xs[0]) and xs[0].numel():
            return self._in_one_call(xs, None)
        if self.normalises_with_batch():
            momentum = momentum_of(self.momentum, self.num_batches_tracked)
        function = er_shortcut_sum if fused else reference_shortcut_sum
        return function(
            xs,
            self.weight,
            norm=self.norm,
            num_groups=self.num_groups,
            running_mean=self.running_mean,
            running_var=self.running_var,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            relu=self.relu,
        )

    def _in_one_call(self, xs: Sequence[Tensor], group: ProcessGroup | None) -> Tensor:
        layout = operators.layout_of(xs)
        maps = [operators.in_layout(x, layout) for x in xs]
        return batch_shortcut_sum(maps, self.arguments(), self.training, self.eps, self.relu, group)

    @_disable_dynamo  # torch.compiler.disable would import the compiler now
    def _forward_across_processes(self, xs: Sequence[Tensor], fused: bool, group: ProcessGroup) -> Tensor:
        # not as training: a process may have a single value, or none
        running = self.running_mean, self.running_var
        check_shortcut_sum(xs, self.weight, self.norm, None, *running, training=False, momentum=0.0, eps=self.eps)
        if not (fused and operators.serves(xs[0]) and one_call_serves(xs[0])):
            raise RuntimeError(NO_NAIVE_GROUP)
        return self._in_one_call(xs, group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the process group, whose handle means nothing to another process."""
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ERShortcut:
        """A copy in the same process group, whose handle cannot be copied itself."""
        memo[id(self.process_group)] = self.process_group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def arguments(self) -> ShortcutArguments:
        """What the algebra of a block with norm="batch" needs of this module."""
        if not self.training:
            return ShortcutArguments(self.weight, self.running_mean, self.running_var, None, True, None)
        if self.momentum is None and self.running_mean is not None and self.num_batches_tracked is None:
            raise ValueError("momentum=None (a cumulative average) needs num_batches_tracked.")
        return ShortcutArguments(
            self.weight, self.running_mean, self.running_var, self.num_batches_tracked, False, self.momentum
        )

    def coefficients(
        self, earlier: Sequence[MapStatistics], last: MapStatistics, z: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients of this block's weighted sum over raw maps; updates the running statistics in training.

        Args:
            earlier: statistics of the num_maps earlier maps.
            last: those of this block's own map.
            z: that map, [N, C, H, W], for its shape and dtype.
        """
        running = None
        if self.norm == "batch" and not self.training:
            assert self.running_mean is not None and self.running_var is not None
            dtype = operators.acc_dtype(z)
            running = self.running_mean.to(dtype), self.running_var.to(dtype)
        elif self.norm == "batch":
            self._update_running(earlier, z.shape[0] * z.shape[2] * z.shape[3])
        weight = self.weight.to(operators.acc_dtype(z))
        return shortcut_coefficients(weight, earlier, last, running, self.eps, z.shape[0])

    def _update_running(self, earlier: Sequence[MapStatistics], count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        momentum = momentum_of(self.momentum, self.num_batches_tracked)
        with torch.no_grad():
            means = torch.stack([m.mean for m in earlier if m.mean is not None])
            variances = torch.stack([m.var for m in earlier if m.var is not None])
        update_running(self.running_mean, self.running_var, means, variances, count, momentum)
