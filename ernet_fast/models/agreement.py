"""How far two networks agree on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ernet_fast.models.calibration import images_of


class Agreement(NamedTuple):
    """Of the logits of two networks."""

    images: int
    top1: float  # share of the images whose largest logit is of the same class
    correlation: float  # of the logits, each class less its mean over the images; NaN if either network's do not vary
    relative_error: float  # |logits - other logits| over |logits|, Euclidean norms

    def __str__(self) -> str:
        return (
            f"{self.images} images: same class {self.top1:.1%}, correlation of logits {self.correlation:.4f}, "
            f"relative error {self.relative_error:.2e}"
        )


@torch.no_grad()
def logit_agreement(model: nn.Module, other: nn.Module, batches: Iterable[Any]) -> Agreement:
    """Compare the logits of `other` with those of `model`, both in evaluation, on the images of `batches`.

    It tells how close a converted network starts: `logit_agreement(resnet, convert_resnet(resnet), images)`.

    Args:
        model: a network from images [N, C, H, W] to logits [N, classes]; it keeps its mode.
        other: likewise. Each gets the images on its own device and in its own dtype.
        batches: images, or tuples that begin with them, such as those of a `DataLoader`.

    Raises:
        ValueError: no images, or logits that differ in shape or are not [N, classes].
    """
    sums: Any = 0.0
    images = same = 0
    for batch in batches:
        x = images_of(batch)
        if not len(x):
            continue
        logits, others = _logits(model, x), _logits(other, x)
        if logits.shape != others.shape or logits.dim() != 2:
            raise ValueError(f"expected logits [N, classes] of both, got {list(logits.shape)}, {list(others.shape)}")
        images += len(x)
        same += int((logits.argmax(1) == others.argmax(1)).sum())
        moments = [logits, others, logits.square(), others.square(), logits * others, (logits - others).square()]
        sums = sums + torch.stack(moments).sum(1)
    if not images:
        raise ValueError("batches hold no images: expected batches of images [N, C, H, W]")
    mean, mean_other, square, square_other, product, error = sums / images
    variance, variance_other = ((s - m * m).sum() for s, m in ((square, mean), (square_other, mean_other)))
    correlation = (product - mean * mean_other).sum() / (variance * variance_other).sqrt()
    relative = (error.sum() / square.sum()).sqrt()
    return Agreement(images, same / images, float(correlation), float(relative))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in float64 on the CPU."""
    weight = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        logits: Tensor = model(images.to(weight.device, weight.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return logits.double().cpu()
