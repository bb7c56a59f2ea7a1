"""What a plain ResNet of given modules computes, and whether a network computes that."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn

from ernet_fast.models.resnet import STAGE_NAMES

_SIZE = 64
_LOST = "The conversion would lose what it does besides: convert a torchvision or timm ResNet with these weights."


def check_computes_plain_resnet(model: nn.Module) -> None:
    """Compare `model` in evaluation mode with the plain ResNet of its modules, on one image of 64x64.

    A forward method of its own, hooks that change values or another order of the layers (pre-activation) show here,
    whatever the modules are called. Networks on the meta device hold no values and are not compared.

    Args:
        model: a network of which `check_plain_resnet` has found the modules; it is not modified and draws no random
            numbers.

    Raises:
        ValueError: the outputs differ, or `model` does not run.
    """
    first = next(module for module in model.get_submodule("conv1").modules() if isinstance(module, nn.Conv2d))
    weight, name = first.weight, type(model).__name__
    if weight.device.type == "meta":
        return
    evaluated = copy.deepcopy(model).eval()
    dtype = weight.dtype
    if torch.finfo(dtype).bits < 32:
        dtype = torch.float32  # tells differences from rounding
        evaluated.to(dtype)
    image = torch.randn(1, first.in_channels, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    image = image.to(weight.device, dtype)
    with torch.no_grad():
        expected = _plain_forward(evaluated, image)
        try:
            found = evaluated(image)
        except Exception as error:  # whatever a forward method of the user's raises
            raise ValueError(
                f"model ({name}) does not run on an image of {_SIZE}x{_SIZE}, so it is not known to be a plain ResNet: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"model ({name}) returns {shape} for one image; a plain ResNet, {list(expected.shape)}. {_LOST}"
        )
    if not _agree(found, expected):
        raise ValueError(
            f"model ({name}) computes something else than a plain ResNet of its modules, for instance by "
            f"{name}.forward, hooks, or BatchNorms before their convolutions. {_LOST}"
        )


def _agree(found: Tensor, expected: Tensor) -> bool:
    """True if both differ by rounding only; values that are not finite agree with themselves."""
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    if not finite.any():
        return True
    tolerance = 256 * torch.finfo(expected.dtype).eps  # the same layers: only pooling may round differently
    difference = (found[finite].double() - expected[finite].double()).abs().max()
    return bool(difference <= tolerance * expected[finite].double().abs().max())


def _plain_forward(model: nn.Module, x: Tensor) -> Tensor:
    x = torch.relu(model.get_submodule("bn1")(model.get_submodule("conv1")(x)))
    x = model.get_submodule("maxpool")(x)
    for name in STAGE_NAMES:
        for block in model.get_submodule(name).children():
            x = _plain_block(block, x)
    x = nn.functional.adaptive_avg_pool2d(x, 1)
    y: Tensor = model.get_submodule("fc")(torch.flatten(x, 1))
    return y


def _plain_block(block: nn.Module, x: Tensor) -> Tensor:
    z, last = x, sum(re.fullmatch(r"conv\d", name) is not None for name, _ in block.named_children())
    for k in range(1, last + 1):
        z = block.get_submodule(f"bn{k}")(block.get_submodule(f"conv{k}")(z))
        z = torch.relu(z) if k < last else z
    downsample = getattr(block, "downsample", None)
    return torch.relu(z + (x if downsample is None else downsample(x)))
