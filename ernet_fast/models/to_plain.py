"""The way back: an ER-ResNet whose shortcuts are those of a plain ResNet, as one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models.blocks import ERBlock, ResidualBranch
from ernet_fast.models.resnet import STAGE_NAMES, ERResNet

_TOLERANCE = 1e-5


class PlainBlock(ResidualBranch):
    """Block l >= 1 of a plain ResNet, of the modules of an ER block: ReLU(bn(z) + y), or ReLU(bn(z))."""

    def __init__(self, block: ERBlock, *, shortcut: bool) -> None:
        nn.Module.__init__(self)
        self.kernel_sizes = block.kernel_sizes  # type: ignore[misc]
        for name, module in block.named_children():
            if name != "shortcut":
                self.add_module(name, copy.deepcopy(module))
        self.joins = shortcut
        self.training = block.training

    def extra_repr(self) -> str:
        """Whether the block has its identity shortcut, for print."""
        return f"shortcut={self.joins}"

    def forward(self, y: Tensor) -> Tensor:
        """The block's output of its input y, both [N, C, H, W]."""
        z = self.branch(y)
        x = self.normalised(z)
        x = self.last_bn(z) if x is None else x
        out: Tensor = self._modules["relu"](x + y if self.joins else x)  # type: ignore[misc]
        return out


class PlainResNet(nn.Module):
    """A plain ResNet with torchvision's names of modules: `conv1`, `bn1`, `layer1` ... `layer4`, `fc`.

    `plain_block` makes a block of the name and the ER block it is given; default: as `to_plain` does.
    """

    def __init__(self, er: ERResNet, plain_block: Callable[[str, Any], PlainBlock] | None = None) -> None:
        super().__init__()
        plain_block = plain_block or _plain_block
        for name in ("conv1", "bn1", "relu", "maxpool"):
            self.add_module(name, copy.deepcopy(er.get_submodule(name)))
        for name in STAGE_NAMES:
            opening, *blocks = er.get_submodule(name).children()
            plain = [plain_block(f"{name}.{k}", block) for k, block in enumerate(blocks, start=1)]
            self.add_module(name, nn.Sequential(copy.deepcopy(opening), *plain))
        for name in ("avgpool", "fc"):
            self.add_module(name, copy.deepcopy(er.get_submodule(name)))
        self.drop_rate = er.drop_rate
        for module in (self, *(self.get_submodule(name) for name in STAGE_NAMES)):
            module.training = er.training

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier `fc` with random weights."""
        features: int = self.get_submodule("fc").in_features  # type: ignore[assignment]
        device = next(self.parameters()).device
        self.add_module("fc", nn.Linear(features, num_classes, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        for name in ("conv1", "bn1", "relu", "maxpool", *STAGE_NAMES, "avgpool"):
            x = self.get_submodule(name)(x)
        x = torch.flatten(x, 1)
        return self.get_submodule("fc")(nn.functional.dropout(x, self.drop_rate, self.training))


def to_plain(model: ERResNet) -> PlainResNet:
    """The plain ResNet that computes in evaluation what `model` does, where its shortcuts allow it.

    An ER block is a plain residual block where its shortcuts add the block's input, and a block without shortcut where
    all ER weights are 0. They add the input only in block 1 of a stage: later blocks of a plain ResNet add a map behind
    its ReLU, and ER shortcuts read those before it. So what `convert_resnet(resnet18, calibrate=...)` gives comes back,
    with torchvision's names of parameters; deeper networks only where weights of 0 were trained or set.

    Args:
        model: the network; not modified, and it shares no tensor with the result.

    Returns:
        A network on the same device, of the same dtype and in the same mode, module by module.

    Raises:
        TypeError: `model` is not an `ERResNet`.
        ValueError: a block's shortcuts are neither the identity nor 0 (to 1e-5 in every channel), normalise with the
            batch at hand (norm="group"), or are folded; or stages are missing. The message names the block.
    """
    if not isinstance(model, ERResNet):
        raise TypeError(f"model must be an ERResNet, got {type(model).__name__}")
    if len(model.stages) < len(STAGE_NAMES) or not model.pool_type:
        raise ValueError("model has lost stages or its pooling: a plain ResNet has four stages and pools their output")
    return PlainResNet(model)


@torch.no_grad()
def _plain_block(name: str, block: nn.Module) -> PlainBlock:
    """A plain block of ER block `name`, what its shortcuts add as constants in its last bias."""
    shortcut = getattr(block, "shortcut", None)
    if not isinstance(block, ERBlock) or not isinstance(shortcut, ERShortcut):
        raise ValueError(
            f"{name} is no ER block with an ERShortcut (folded networks have none): {type(shortcut).__name__}"
        )
    if not shortcut.weight.any():
        return PlainBlock(block, shortcut=False)
    if shortcut.norm != "batch" or shortcut.running_mean is None:
        raise ValueError(f"{name}.shortcut normalises with the batch at hand: no plain block does")
    a = shortcut.weight.double() * torch.rsqrt(shortcut.running_var.double() + shortcut.eps)
    if shortcut.num_maps > 1:
        raise ValueError(
            f"{name}.shortcut reads {shortcut.num_maps} maps before their ReLU, and a plain block adds one behind its "
            "ReLU: only weights of 0 have a plain counterpart there"
        )
    off = float((a - 1.0).abs().max())
    if not off <= _TOLERANCE:
        raise ValueError(f"{name}.shortcut is not the identity: it scales channels by up to 1 +- {off:.3g}")
    plain, shift = PlainBlock(block, shortcut=True), (a * shortcut.running_mean.double()).sum(0)
    bias = None if "se" in block._modules else getattr(plain.last_bn, "bias", None)
    if bias is None and shift.any():
        raise ValueError(f"{name}.shortcut takes a mean away, which no bias behind its last BatchNorm can give back")
    if bias is not None:
        bias.sub_(shift.to(bias.dtype))
    return plain
