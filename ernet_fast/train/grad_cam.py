"""Where a network looked: Grad-CAM (Selvaraju et al., ICCV 2017).

The package grad-cam gives the same maps. It needs torchvision, beside which Fabric and torchmetrics cannot be imported
where torchvision's operators do not load, and it leaves gradients in the parameters; hence these few lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def last_feature_layer(network: nn.Module) -> nn.Module:
    """The layer whose maps Grad-CAM weighs: `layer4`, the last stage of a ResNet; otherwise the last convolution.

    Raises ValueError for a network with neither.
    """
    stage = getattr(network, "layer4", None)
    found = [stage] if isinstance(stage, nn.Module) else [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    if not found:
        raise ValueError(f"{type(network).__name__} has neither layer4 nor a convolution: name the layer for Grad-CAM.")
    return found[-1]


def grad_cam(
    network: nn.Module,
    images: Tensor,
    classes: Tensor,
    *,
    layer: nn.Module | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Maps [N, H, W] float32 of what speaks for one class of each image, each from 0 to 1 (all 0 where nothing does).

    The maps of `layer` are weighted by the mean over the pixels of the logit's gradient, summed over channels, cut off
    below 0, enlarged bilinearly and scaled to 0 ... 1. `network` is left in evaluation mode; no gradient of a parameter
    is written.

    Args:
        network: gives logits [N, K]; at least one parameter of `layer` or before it requires a gradient.
        images: network input [N, 3, H, W].
        classes: class of each image [N] int64.
        layer: any module of the network with a 4-dimensional output; default: `last_feature_layer`.
        forward: how the network is called, e.g. under autocast; default: `network` itself.
    """
    kept: list[Tensor] = []
    handle = (layer or last_feature_layer(network)).register_forward_hook(lambda _, __, output: kept.append(output))
    network.eval()
    try:
        with torch.enable_grad():
            logits = (forward or network)(images)
            chosen = logits.gather(1, classes.to(logits.device)[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, kept[0])
    finally:
        handle.remove()
    weights = gradient.float().mean(dim=(2, 3), keepdim=True)
    maps = (weights * kept[0].detach().float()).sum(dim=1, keepdim=True).relu()
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear")[:, 0].cpu()
    low, high = (getattr(maps, name)(dim=(1, 2), keepdim=True) for name in ("amin", "amax"))
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
