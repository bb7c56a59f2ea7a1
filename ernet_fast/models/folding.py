"""ER networks for inference: every BatchNorm folded into its convolution, every shortcut's constants worked out."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar, cast

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ernet_fast.er.shortcut import ERShortcut, FoldedShortcut
from ernet_fast.models.blocks import ERBlock, ResidualBranch
from ernet_fast.models.resnet import ERResNet
from ernet_fast.models.stage import ERStage

Model = TypeVar("Model", bound=nn.Module)


def fold_for_inference(model: Model) -> Model:
    """A copy of an ER network for inference, with what is constant in evaluation computed once.

    Each BatchNorm behind a convolution is folded into it, as `torch.nn.utils.fusion.fuse_conv_bn_eval` does, leaving an
    `nn.Identity`; with norm="batch" each `ERShortcut` becomes a `FoldedShortcut`, one weighted sum with stored
    coefficients. Outputs are those of `model` to rounding, and can still be differentiated towards the images.

    The copy has no statistics, so its `train()` changes nothing but dropout, and its state dict (convolutions with
    `weight` and `bias`; `shortcut.a`, `shortcut.b`) fits only networks that were folded too. Keep the state dict of
    `model` to go on training, and save or export the copy to deploy. Convert `model` to another dtype before.

    Args:
        model: a network or part of one that holds at least one `ERStage`, in evaluation mode; it is not modified.

    Returns:
        The copy, of the same class, on the same device, in evaluation mode.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it is in training mode, holds no `ERStage`, or one that is folded, or a BatchNorm without running
            statistics, which normalises with the batch even in evaluation; the message names the module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, ERStage) for module in model.modules()):
        raise ValueError(f"the {type(model).__name__} holds no ERStage, so there is nothing to fold.")
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else f"the {type(model).__name__}"
        if isinstance(module, FoldedShortcut):
            raise ValueError(f"{where} is folded already.")
        if module.training:
            raise ValueError(f"{where} is in training mode: call model.eval() first.")
        if _is_batch_norm(module) and module.running_mean is None:
            raise ValueError(f"{where} has no running statistics: its BatchNorm has no constants to fold.")
    folded = copy.deepcopy(model)
    for module in list(folded.modules()):
        if isinstance(module, ERResNet):
            stem = module.conv1  # a deep stem ends in the convolution that bn1 follows
            last = f"conv1.{len(stem) - 1}" if type(stem) is nn.Sequential and len(stem) else "conv1"
            _fold_pair(module, last, "bn1")
        if isinstance(module, ResidualBranch):
            for k in range(1, len(module.kernel_sizes) + 1):
                _fold_pair(module, f"conv{k}", f"bn{k}")
        if type(module) is nn.Sequential:  # projections, deep stems
            for first, second in itertools.pairwise(list(module._modules)):
                _fold_pair(module, first, second)
        if isinstance(module, ERBlock) and module.shortcut.norm == "batch":
            module.shortcut = cast(ERShortcut, FoldedShortcut(module.shortcut).eval())
    return folded


def _is_batch_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)


def _fold_pair(owner: nn.Module, conv_name: str, bn_name: str) -> None:
    """Fold a BatchNorm into the convolution before it, if both are what they are in torchvision's networks."""
    conv, bn = owner.get_submodule(conv_name), owner.get_submodule(bn_name)
    if type(conv) is nn.Conv2d and _is_batch_norm(bn):
        parent, _, child = conv_name.rpartition(".")
        setattr(owner.get_submodule(parent), child, fuse_conv_bn_eval(conv, cast(nn.BatchNorm2d, bn)))
        setattr(owner, bn_name, nn.Identity().eval())
