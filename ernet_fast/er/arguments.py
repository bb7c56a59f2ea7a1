"""Checks of the arguments that the ER functions share, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

NORMS = ("batch", "group")
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_norm(norm: str, num_groups: int | None, channels: int) -> None:
    """Raise ValueError unless `norm` is known and `num_groups` fits it and divides `channels`."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected 'batch' or 'group'.")
    if norm == "batch" and num_groups is not None:
        raise ValueError(f"num_groups={num_groups} has no meaning with norm='batch'; leave it out or use norm='group'.")
    if norm == "group":
        if num_groups is None:
            raise ValueError("norm='group' needs num_groups (1 is layer norm, the number of channels instance norm).")
        if not isinstance(num_groups, int):
            raise TypeError(f"num_groups is {num_groups!r}; expected an int.")
        if num_groups < 1 or channels % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide the {channels} channels of the maps.")


def check_eps(eps: float) -> float:
    """`eps` as a Python number; raises unless it is a finite one > 0."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps is a {type(eps).__name__}; expected a number > 0.")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; expected a finite number > 0.")
    return float(eps)


def check_momentum(momentum: float) -> float:
    """`momentum` as a Python number; raises unless it is one from 0 to 1."""
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise TypeError(f"momentum is a {type(momentum).__name__}; expected a number from 0 to 1.")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; expected a number from 0 to 1.")
    return float(momentum)


def check_flags(**flags: bool) -> None:
    """Raise TypeError unless every argument is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected True or False.")


def check_maps(xs: Sequence[Tensor]) -> None:
    """Raise unless `xs` holds at least one 4-dimensional floating map, all alike."""
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        raise TypeError(f"xs must be a sequence of maps [N, C, H, W]; got {type(xs).__name__}.")
    if not xs:
        raise ValueError("xs is empty; it must hold at least one map [N, C, H, W].")
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise TypeError(f"xs[{i}] is a {type(x).__name__}; expected a tensor.")
        if x.dtype not in _FLOATING:
            raise TypeError(f"xs[{i}] is {x.dtype}; expected float32, float64, bfloat16 or float16.")
        if x.dim() != 4:
            raise ValueError(f"xs[{i}] has shape {tuple(x.shape)}; expected 4 dimensions [N, C, H, W].")
        if x.layout != torch.strided:
            raise TypeError(f"xs[{i}] has layout {x.layout}; expected a dense tensor. Call .to_dense() on it.")
        first = xs[0]
        if x.shape != first.shape:
            raise ValueError(
                f"xs[{i}] has shape {tuple(x.shape)} but xs[0] {tuple(first.shape)}; all maps must have one shape."
            )
        if x.dtype != first.dtype:
            raise TypeError(f"xs[{i}] is {x.dtype} but xs[0] {first.dtype}; the maps must have one dtype.")
        if x.device != first.device:
            raise ValueError(f"xs[{i}] is on {x.device} but xs[0] on {first.device}; the maps must be on one device.")


def check_weight(weight: Tensor, xs: Sequence[Tensor]) -> None:
    """Raise unless `weight` is [len(xs) - 1, C], floating, on the device of the maps."""
    expected = (len(xs) - 1, xs[0].shape[1])
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; expected a tensor of shape {expected}.")
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected {expected}: one row of {expected[1]} channel weights "
            f"for each of the {expected[0]} earlier maps."
        )
    if weight.dtype not in (torch.float32, xs[0].dtype):
        raise TypeError(f"weight is {weight.dtype}; expected float32 or the dtype of the maps, {xs[0].dtype}.")
    if weight.device != xs[0].device:
        raise ValueError(f"weight is on {weight.device} but the maps on {xs[0].device}; move it there.")


def check_running(
    name: str, running: Sequence[Tensor] | Tensor | None, num_maps: int, like: Tensor
) -> Sequence[Tensor] | None:
    """The rows of running statistics, one [C] tensor for each of `num_maps` maps, or None."""
    if running is None:
        return None
    channels = like.shape[1]
    if not isinstance(running, Tensor | Sequence):
        raise TypeError(
            f"{name} is a {type(running).__name__}; expected {num_maps} tensors of shape ({channels},), "
            f"or one of shape ({num_maps}, {channels})."
        )
    if len(running) != num_maps:
        raise ValueError(f"{name} has {len(running)} entries; expected {num_maps}, one for each earlier map.")
    rows = list(running.unbind(0)) if isinstance(running, Tensor) else list(running)
    size, device = (channels,), like.device
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor):
            raise TypeError(f"{name}[{i}] is a {type(row).__name__}; expected a tensor of shape ({channels},).")
        if row.shape != size:
            raise ValueError(f"{name}[{i}] has shape {tuple(row.shape)}; expected ({channels},).")
        if row.dtype not in _FLOATING:
            raise TypeError(f"{name}[{i}] is {row.dtype}; expected float32, float64, bfloat16 or float16.")
        if row.device != device:
            raise ValueError(f"{name}[{i}] is on {row.device} but the maps on {device}.")
    return rows


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    """True if a tensor is expanded, or two start at the same place."""
    for t in tensors:
        if not t.is_contiguous() and any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)):
            return True
    if len(tensors) < 2 or any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        return False  # tensors of a transform of torch.func have no storage
    return len({(t.untyped_storage()._cdata, t.storage_offset()) for t in tensors}) < len(tensors)


def check_shortcut_sum(
    xs: Sequence[Tensor],
    weight: Tensor,
    norm: str,
    num_groups: int | None,
    running_mean: Sequence[Tensor] | Tensor | None,
    running_var: Sequence[Tensor] | Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool = False,
) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """All checks of `er_shortcut_sum`; returns the running statistics as rows.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, device, value or combination that does not fit; the message names the argument.
    """
    check_maps(xs)
    check_norm(norm, num_groups, xs[0].shape[1])
    check_weight(weight, xs)
    check_eps(eps)
    check_momentum(momentum)
    check_flags(training=training, relu=relu)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together; only one of them was given.")
    if norm == "group":
        if running_mean is not None:
            raise ValueError("norm='group' has no running statistics; leave running_mean and running_var out.")
        return None, None
    means = check_running("running_mean", running_mean, len(xs) - 1, xs[0])
    variances = check_running("running_var", running_var, len(xs) - 1, xs[0])
    if training and means and variances and not torch.compiler.is_compiling() and _share_memory([*means, *variances]):
        raise ValueError(
            "entries of running_mean and running_var share memory, and training updates each by itself. Call .clone() "
            "on what was expanded or given twice."
        )
    if not training and means is None and len(xs) > 1:
        raise ValueError("training=False with norm='batch' needs running_mean and running_var.")
    values_per_channel = xs[0].shape[0] * xs[0].shape[2] * xs[0].shape[3]
    if training and values_per_channel == 1 and len(xs) > 1:
        raise ValueError(
            f"xs have shape {tuple(xs[0].shape)}, one value a channel: its variance is not defined. "
            "Use a larger batch or map, norm='group', or training=False."
        )
    return means, variances
