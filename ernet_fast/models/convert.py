"""Conversion of a ResNet of torchvision's or timm's form into an ER-ResNet."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ernet_fast.er.shortcut import ERShortcut
from ernet_fast.models.blocks import ERBlock, ProjectionBlock
from ernet_fast.models.calibration import calibrate_shortcuts, check_can_calibrate
from ernet_fast.models.drop_path import DropPath
from ernet_fast.models.plain_resnet import check_computes_plain_resnet, check_plain_resnet
from ernet_fast.models.resnet import DEFAULT_GROUPS, EXPANSION, STAGE_NAMES, ERResNet

_STEM = ("conv1", "bn1", "maxpool")
_FAMILY = {(3, 3): "basic", (1, 3, 1): "bottleneck"}


def convert_resnet(
    model: nn.Module,
    *,
    norm: str = "batch",
    num_groups: int | None = None,
    fused: bool = True,
    calibrate: Iterable[Any] | None = None,
) -> ERResNet:
    """An ER-ResNet with the convolutions, BatchNorms and classifier of a plain ResNet.

    The model is recognised by the names of its modules (`conv1`, `bn1`, `layer1` ... `layer4`, `fc`), as torchvision
    and timm have them; neither package is needed. That it computes what these modules do in a plain ResNet is checked
    on one image of 64x64. Stem, strides, dilations, grouped convolutions, projections, channel attention (`se`) and
    blurring downsampling (`aa`) are taken over as they are.

    Without `calibrate`, ER weights start at 1 with fresh running statistics: in training the result computes another
    function than `model`. With it weights, statistics and last biases are set so that the result starts close to
    `model` (`ernet_fast.models.calibration` says how), and equal to it where no stage has more than two blocks;
    `logit_agreement` measures how close. Either way it wants fine-tuning.

    Args:
        model: the ResNet; not modified, and it shares no tensor with the result.
        norm: normaliser of the shortcuts, "batch" or "group".
        num_groups: groups of norm="group", default 32.
        fused: see `ERStage`.
        calibrate: batches of images [N, C, H, W], or tuples that begin with them, prepared as for `model`; 64 images
            of the kind to come are enough. The maps of one stage are held for all of them at once, about 35 MB an image
            of 224x224 for ResNet-50. With norm="batch" only, and without `se`.

    Returns:
        A network on the same device, of the same dtype and in the same mode, module by module, with `requires_grad`
        of every copied parameter kept.

    Raises:
        TypeError: `model` is not a module, or already an ER-ResNet.
        ValueError: it is not a plain ResNet: attention other than SE and ECA or elsewhere than before the sum,
            DropBlock, other activations or normalisers, BatchNorms before their convolutions, a forward method
            of its own, or a scripted, compiled or wrapped network (DistributedDataParallel); or a module that is not
            taken over has hooks. The message names the module. Or it cannot be calibrated.
    """
    if isinstance(model, ERResNet):
        raise TypeError("model is an ER-ResNet already")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    stages = check_plain_resnet(model)
    fc, num_features, num_classes = model.get_submodule("fc"), stages[-1][-1][1], 0
    if not isinstance(fc, nn.Identity):
        linears = [module for module in fc.modules() if isinstance(module, nn.Linear)]
        if not linears or linears[0].in_features != num_features:
            expected = f"a linear layer (or a sequence with some) on {num_features} features"
            raise ValueError(f"fc must be {expected}, got {fc}")
        num_classes = linears[-1].out_features
    if calibrate is not None:
        check_can_calibrate(model, norm)
    check_computes_plain_resnet(model)
    if norm == "group" and num_groups is None:
        num_groups = DEFAULT_GROUPS
    kernel_sizes, channels = stages[0][0]
    family, layers = _FAMILY[kernel_sizes], [len(blocks) for blocks in stages]
    stem = channels // EXPANSION[family]
    with torch.device("meta"):  # structure only: every module with tensors is replaced below
        er = ERResNet(family, layers, 0, norm=norm, num_groups=num_groups, fused=fused, base_channels=stem)
    for module in er.modules():
        module.training = model.training
    for name in (*_STEM, "fc"):
        setattr(er, name, copy.deepcopy(model.get_submodule(name)))
    for stage, name in zip(er.stages, STAGE_NAMES, strict=True):
        for block, plain in zip(stage, model.get_submodule(name).children(), strict=True):
            block.training = plain.training
            for child in dict(block.named_children()):
                if re.fullmatch(r"(conv|bn)\d", child):
                    setattr(block, child, copy.deepcopy(plain.get_submodule(child)))
            for child in ("aa", "se"):
                if not isinstance(getattr(plain, child, None), nn.Identity | None):
                    block.add_module(child, copy.deepcopy(plain.get_submodule(child)))
            drop_path: Any = getattr(plain, "drop_path", None)
            rate = getattr(drop_path, "drop_prob", getattr(drop_path, "rate", 0.0))
            if rate:
                block.add_module("drop_path", DropPath(rate).train(drop_path.training))
            if isinstance(block, ProjectionBlock):
                block.downsample = copy.deepcopy(getattr(plain, "downsample", None))
            if isinstance(block, ERBlock):
                weight, old = block.last_bn.weight, block.shortcut
                new = ERShortcut(weight.numel(), old.num_maps, norm=norm, num_groups=num_groups, relu=True, fused=fused)
                block.shortcut = new.to(weight.device, weight.dtype).train(block.training)
    er.num_classes = num_classes
    er.in_channels = next(m.in_channels for m in er.conv1.modules() if isinstance(m, nn.Conv2d))
    er.drop_rate = float(getattr(model, "drop_rate", 0.0))
    er.arguments |= _arguments(er)
    if calibrate is not None:
        calibrate_shortcuts(er, model, calibrate)
    return er


def _arguments(er: ERResNet) -> dict[str, Any]:
    """Arguments of `ERResNet` that its modules show, as far as they do; `save_pretrained` compares them with all."""
    opening = er.stages[0][0]
    spatial = opening.get_submodule("conv2" if er.arguments["family"] == "bottleneck" else "conv1")
    assert isinstance(spatial, nn.Conv2d)
    conv1 = er.conv1 if isinstance(er.conv1, nn.Conv2d) else None
    return {
        "in_channels": 3 if conv1 is None else conv1.in_channels,
        "groups": spatial.groups,
        "width_per_group": spatial.out_channels * 64 // (spatial.groups * er.arguments["base_channels"]),
        "replace_stride_with_dilation": [stage.stride == 1 for stage in er.stages[1:]],
        "drop_rate": er.drop_rate,
    }
