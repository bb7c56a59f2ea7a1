"""The ER-ResNets of 18 to 152 layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from ernet_fast.models.resnet import FAMILY, LAYERS, ERResNet
from ernet_fast.models.weights import load_torchvision_state_dict, read_weights

Weights = str | PathLike[str] | Mapping[str, Any]


def er_resnet18(num_classes: int = 1000, *, weights: Weights | None = None, **kw: Any) -> ERResNet:
    """ER-ResNet of 18 layers, 11.69 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(18, num_classes, weights, **kw)


def er_resnet34(num_classes: int = 1000, *, weights: Weights | None = None, **kw: Any) -> ERResNet:
    """ER-ResNet of 34 layers, 21.80 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(34, num_classes, weights, **kw)


def er_resnet50(
    num_classes: int = 1000,
    *,
    weights: Weights | None = None,
    norm: str = "batch",
    fused: bool = True,
    in_channels: int = 3,
    **kw: Any,
) -> ERResNet:
    """ER-ResNet of 50 layers, 25.58 M parameters with 1000 classes.

    Args:
        num_classes: outputs of the classifier; 0 for pooled features.
        weights: a state dict, or the path of a .pt/.pth or .safetensors file with one, of torchvision's ResNet of
            this depth (the ER weights stay at 1) or of this network. Names of published weights are not downloaded.
        norm: normaliser of the shortcuts, "batch" or "group".
        fused: compute each block epilogue in one pass (True) or with plain PyTorch operators (False).
        in_channels: channels of the input images.
        **kw: further arguments of `ERResNet`: block, num_groups, base_channels, groups, width_per_group,
            replace_stride_with_dilation, drop_rate, drop_path_rate, global_pool; and `device` and `dtype` of tensors.

    Raises:
        TypeError, ValueError: an argument out of its range, or weights that do not fit the network.
        FileNotFoundError: `weights` names no file.

    torchvision's `zero_init_residual` is not offered: the shortcuts normalise every map, so a branch of scale 0
    would not start as the identity but at a point where the normaliser's derivative is 1/sqrt(eps).
    """
    return _build(50, num_classes, weights, norm=norm, fused=fused, in_channels=in_channels, **kw)


def er_resnet101(num_classes: int = 1000, *, weights: Weights | None = None, **kw: Any) -> ERResNet:
    """ER-ResNet of 101 layers, 44.82 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(101, num_classes, weights, **kw)


def er_resnet152(num_classes: int = 1000, *, weights: Weights | None = None, **kw: Any) -> ERResNet:
    """ER-ResNet of 152 layers, 60.86 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(152, num_classes, weights, **kw)


def _build(
    depth: int,
    num_classes: int,
    weights: Weights | None,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **kw: Any,
) -> ERResNet:
    known = list(inspect.signature(ERResNet).parameters)[2:]  # family and layers go with the depth
    unknown = [keyword for keyword in kw if keyword not in known]
    if unknown:
        known += ["weights", "device", "dtype"]
        raise TypeError(f"er_resnet{depth} has no argument {', '.join(unknown)}; its arguments are {', '.join(known)}")
    state = None if weights is None else read_weights(weights)
    with contextlib.nullcontext() if device is None else torch.device(device):
        model = ERResNet(FAMILY[depth], LAYERS[depth], num_classes, **kw)
    if dtype is not None:
        model.to(dtype)
    if state is not None:
        load_torchvision_state_dict(model, state)
    return model
