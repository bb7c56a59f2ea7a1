"""The shortcuts of one block, as a module: trained, and folded for inference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ernet_fast.er import operators
from ernet_fast.er.arguments import check_eps, check_flags, check_momentum, check_norm, check_shortcut_sum
from ernet_fast.er.epilogue_arguments import ShortcutArguments
from ernet_fast.er.functional import er_shortcut_sum
from ernet_fast.er.plain import is_plain
from ernet_fast.er.process_group import NO_NAIVE_GROUP, ProcessGroup, active_group, group_of
from ernet_fast.er.shortcut_sum import shortcut_sum
from ernet_fast.er.unfused_coefficients import momentum_of
from ernet_fast.reference.er import er_shortcut_sum as reference_shortcut_sum

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def _own_or_of_statistics(name: str, doc: str) -> Any:
    """A property that an `ERShortcut` has by itself, as _`name`, where it has no `statistics`."""

    def get(self: ERShortcut) -> float | None:
        return getattr(self, f"_{name}") if self.statistics is None else getattr(self.statistics, name)

    def put(self: ERShortcut, value: float | None) -> None:
        if self.statistics is None:
            setattr(self, f"_{name}", value)
        else:
            setattr(self.statistics, name, value)

    return property(get, put, doc=doc)


def _running(name: str, doc: str) -> Any:
    """A property for the buffer `name` of `statistics`, a row for each map; None where there is none."""

    def get(self: ERShortcut) -> Tensor | None:
        value = None if self.statistics is None else getattr(self.statistics, name)
        return value if value is None or name == "num_batches_tracked" else value.view(self.num_maps, self.channels)

    def put(self: ERShortcut, value: Tensor | None) -> None:
        if self.statistics is None:
            raise AttributeError(f"an ERShortcut with norm='group' has no {name}.")
        if value is not None and name != "num_batches_tracked":
            value = value.reshape(-1)
        setattr(self.statistics, name, value)

    return property(get, put, doc=doc)


class ERShortcut(nn.Module):
    """`y = ReLU(x_l + sum_i w_i * N(x_i))` over the maps x_0 ... x_{l-1} of earlier blocks.

    Equation (10) of the ERNet paper. `w_i` is a vector of channel weights, 1 at first; N normalises a map to zero mean
    and unit variance without affine parameters.

    Parameters and modules:
        weight: [num_maps, channels], float32.
        statistics: with norm="batch", an `nn.BatchNorm2d` of num_maps * channels channels without affine parameters,
            which normalises all earlier maps side by side: N. Tools that look for BatchNorms (`update_bn`, freezing,
            momentum, `convert_sync_batchnorm`) find it and set what N does. Attributes `running_mean` and `running_var`
            [num_maps, channels], `num_batches_tracked`, `eps` and `momentum` are its own, and the state dict holds the
            first three under these names.
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
        check_flags(relu=relu, fused=fused)
        eps = check_eps(eps)
        if momentum is not None:
            momentum = check_momentum(momentum)
        self.channels, self.num_maps = channels, num_maps
        self.norm, self.num_groups = norm, num_groups
        if norm == "group" and process_group is not None:
            raise ValueError("process_group has no meaning with norm='group', whose statistics are of one sample.")
        self.relu, self.fused = relu, fused
        self.process_group = process_group
        self.weight = nn.Parameter(torch.ones(num_maps, channels))
        self._keep_statistics(eps, momentum)

    def _keep_statistics(self, eps: float, momentum: float | None) -> None:
        self.statistics: Any = None
        if self.norm == "batch":
            self.statistics = nn.BatchNorm2d(self.num_maps * self.channels, eps, momentum, affine=False)
        else:
            self._eps, self._momentum = eps, momentum

    eps = _own_or_of_statistics("eps", "Added to variances.")
    momentum = _own_or_of_statistics("momentum", "Of the running statistics; None for a cumulative average.")
    running_mean = _running("running_mean", "[num_maps, channels], a view of the one of `statistics`.")
    running_var = _running("running_var", "[num_maps, channels], a view of the one of `statistics`.")
    num_batches_tracked = _running("num_batches_tracked", "As in `nn.BatchNorm2d`.")

    def reset_parameters(self) -> None:
        """Set weights to 1 and running statistics to those of nothing seen."""
        nn.init.ones_(self.weight)
        if isinstance(self.statistics, _BATCH_NORMS):
            self.statistics.reset_running_stats()

    def extra_repr(self) -> str:
        """The arguments, for print."""
        groups = "" if self.num_groups is None else f", num_groups={self.num_groups}"
        return f"{self.channels}, num_maps={self.num_maps}, norm={self.norm!r}{groups}, fused={self.fused}"

    def normalises_with_batch(self) -> bool:
        """True if N takes the statistics of the batch at hand: in training, or without running statistics."""
        statistics = self.statistics
        return statistics is not None and ((self.training and statistics.training) or statistics.running_mean is None)

    def sums_plainly(self) -> bool:
        """True if a call of this module would run no more than `forward` of this class, and of its BatchNorm."""
        return is_plain(self, ERShortcut) and (self.statistics is None or is_plain(self.statistics, _BATCH_NORMS))

    def check_maps_filed(self, filed: int, z: Tensor) -> None:
        """Raise ValueError unless `filed` maps of the channels of `z` are what the weights are for."""
        traced = not isinstance(z, Tensor) or torch.jit.is_tracing()
        if filed != self.num_maps or not (traced or z.shape[1] == self.channels):
            raise ValueError(
                f"ERShortcut has weights for {self.num_maps} earlier maps of {self.channels} channels; "
                f"got {filed} maps of {z.shape[1]} channels."
            )

    def forward(self, xs: Sequence[Tensor], fused: bool | None = None, relu: bool | None = None) -> Tensor:
        """Apply the shortcuts.

        Args:
            xs: num_maps + 1 maps [N, C, H, W]; the last is the output of this block's branch.
            fused: overrides the module's own setting.
            relu: likewise.

        Returns:
            [N, C, H, W], in the dtype and layout of the maps.

        Raises:
            TypeError, ValueError: maps that do not fit, see `er_shortcut_sum`; no statistics have been updated then.
        """
        relu = self.relu if relu is None else relu
        fused = self.fused if fused is None else fused
        statistics = self.statistics
        traced = torch.jit.is_tracing() or not all(isinstance(x, Tensor) for x in xs)
        if traced or not (statistics is None or is_plain(statistics, _BATCH_NORMS)):
            return self._by_calling(xs, relu)
        training = self.normalises_with_batch()
        # a group of one's own, else that of an nn.SyncBatchNorm
        group = active_group(self.process_group) if training else None
        if group is None and training and isinstance(statistics, nn.SyncBatchNorm):
            group = group_of(statistics)
        if group is not None:
            return self._forward_across_processes(xs, fused, relu, group)
        options: dict[str, Any] = {
            "norm": self.norm,
            "num_groups": self.num_groups,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "training": training,
            "momentum": 0.0 if self.momentum is None else self.momentum,
            "eps": self.eps,
        }
        check_shortcut_sum(xs, self.weight, **options)
        if fused and self.norm == "batch" and xs[0].numel() and operators.why_plain(xs[0]) is None:
            return shortcut_sum(xs, self.arguments(), measure=training, eps=self.eps, relu=relu)
        if training:
            options["momentum"] = momentum_of(self.momentum, self.num_batches_tracked)
        function = er_shortcut_sum if fused else reference_shortcut_sum
        return function(xs, self.weight, relu=relu, **options)

    def _by_calling(self, xs: Sequence[Tensor], relu: bool) -> Tensor:
        """The sum for tracers, and where `self.statistics` has hooks or is of another class: N by its call."""
        if self.statistics is None:
            assert self.num_groups is not None
            # not that of nn.functional, which compares traced sizes
            normalised: Any = [torch.group_norm(x, self.num_groups, None, None, self.eps) for x in xs[:-1]]
        else:
            normalised = self.statistics(torch.cat(list(xs[:-1]), 1)).chunk(self.num_maps, 1)
        y = xs[-1]
        for i in range(self.num_maps):  # neither is iterated: symbolic tracing has proxies of both
            y = y + self.weight[i].view(1, -1, 1, 1) * normalised[i]
        return (y.relu() if relu else y).to(xs[-1].dtype)

    @_disable_dynamo  # torch.compiler.disable would import the compiler now
    def _forward_across_processes(self, xs: Sequence[Tensor], fused: bool, relu: bool, group: ProcessGroup) -> Tensor:
        # not as training: a process may have a single value, or none
        running = self.running_mean, self.running_var
        check_shortcut_sum(xs, self.weight, self.norm, None, *running, training=False, momentum=0.0, eps=self.eps)
        if not fused or operators.why_plain(xs[0]) is not None:
            raise RuntimeError(NO_NAIVE_GROUP)
        return shortcut_sum(xs, self.arguments(), measure=True, eps=self.eps, relu=relu, group=group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the process group, whose handle means nothing to another process."""
        return {**super().__getstate__(), "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ERShortcut:
        """A copy in the same process group, whose handle cannot be copied itself."""
        memo[id(self.process_group)] = self.process_group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled module, also of a version in which the running statistics were buffers of its own."""
        super().__setstate__(state)
        if "statistics" in self._modules or "statistics" in self.__dict__:
            return
        eps, momentum = self.__dict__.pop("eps"), self.__dict__.pop("momentum")
        buffers = {name: self._buffers.pop(name) for name in _BUFFERS}
        self._keep_statistics(eps, momentum)
        if self.statistics is not None:
            self.statistics.train(self.training)
            for name, value in buffers.items():
                setattr(self, name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module, with the running statistics as `running_mean` and `running_var` [num_maps, channels]."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        for name in _BUFFERS:
            value = state.pop(f"{prefix}statistics.{name}", None)
            if value is not None:
                state[prefix + name] = value if value.dim() == 0 else value.view(self.num_maps, self.channels)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _BUFFERS:
            value = state_dict.pop(prefix + name, None)
            if value is not None and self.statistics is not None:
                if isinstance(value, Tensor) and value.shape == (self.num_maps, self.channels):
                    value = value.reshape(-1)
                state_dict[f"{prefix}statistics.{name}"] = value
            elif value is not None:
                state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def arguments(self) -> ShortcutArguments:
        """What the epilogue of a block needs of this module.

        Raises:
            ValueError: a cumulative average without its count.
        """
        statistics = self.statistics
        if statistics is None or statistics.running_mean is None:
            return ShortcutArguments(self.weight)
        rows = self.num_maps, self.channels
        mean, var, batches = statistics.running_mean, statistics.running_var, statistics.num_batches_tracked
        mean, var, momentum = mean.view(rows), var.view(rows), statistics.momentum
        if not (self.training and statistics.training):
            return ShortcutArguments(self.weight, mean, var, None, True, None)
        if momentum is None and batches is None:
            raise ValueError("momentum=None (a cumulative average) needs num_batches_tracked.")
        return ShortcutArguments(self.weight, mean, var, batches, False, momentum)


class FoldedShortcut(nn.Module):
    """`y = ReLU(x_l + sum_i a_i * x_i + b)`: an `ERShortcut` in evaluation, where N(x_i) is a scale and a shift.

    Buffers:
        a: [num_maps + 1, channels], the last row 1; float64 if the shortcut's were, else float32.
        b: [channels].
    """

    def __init__(self, shortcut: ERShortcut) -> None:
        """Fold `shortcut`, which has norm="batch"; it is not modified."""
        super().__init__()
        if shortcut.running_mean is None or shortcut.running_var is None:
            raise ValueError("an ERShortcut with norm='group' has no constants: it normalises with the batch at hand.")
        weight = shortcut.weight.detach()
        factor = weight.double() * torch.rsqrt(shortcut.running_var.double() + shortcut.eps)
        dtype = operators.acc_dtype(weight)
        rounded = torch.cat([factor, torch.ones_like(factor[:1])]).to(dtype)
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", rounded)
        # the constant goes with the coefficients as they are stored
        self.register_buffer("b", -(rounded[:-1].double() * shortcut.running_mean.double()).sum(0).to(dtype))
        self.relu = shortcut.relu

    def forward(self, xs: Sequence[Tensor], fused: bool = True, relu: bool | None = None) -> Tensor:
        """Y [N, C, H, W] of the maps x_0 ... x_l; `fused` in one pass where operators support the device."""
        relu = self.relu if relu is None else relu
        # symbolic tracing has no dtype to look at
        dtype = operators.acc_dtype(xs[-1]) if isinstance(xs[-1], Tensor) else self.a.dtype
        a, b = self.a.to(dtype), self.b.to(dtype)
        if fused and operators.why_plain(xs[-1]) is None:
            layout = operators.layout_of(xs)
            return operators.weighted_sum([x.contiguous(memory_format=layout) for x in xs], a, b, relu)
        y = xs[-1] + b.view(1, -1, 1, 1)
        for i in range(len(xs) - 1):  # `a` is not iterated: a trace would warn
            y = y + a[i].view(1, -1, 1, 1) * xs[i]
        return (y.relu() if relu else y).to(xs[-1].dtype)
