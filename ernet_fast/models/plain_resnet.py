"""Plain ResNets: one is built without torchvision, and others are recognised by their modules and what they compute."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.models.depths import Weights
from ernet_fast.models.resnet import FAMILY, LAYERS, STAGE_NAMES, ERResNet
from ernet_fast.models.to_plain import PlainBlock as PlainResidualBlock
from ernet_fast.models.to_plain import PlainResNet
from ernet_fast.models.weights import load_torchvision_state_dict, read_weights

_NEEDED = ("conv1", "bn1", "maxpool", *STAGE_NAMES, "fc")
_KERNELS = ((3, 3), (1, 3, 1))
_SIZE = 64
_AA = {"AvgPool2d", "BlurPool2d"}
"""Blurring downsampling of timm's `aa_layer`, by the names of its classes."""
_ATTENTION = {"SEModule", "EffectiveSEModule", "EcaModule", "CecaModule", "SqueezeExcitation"}
"""Channel attention of timm's and torchvision's, likewise."""
_DROP_PATH = {"DropPath"}
"""Stochastic depth of timm's and of this library's blocks, likewise."""
_LOST = "The conversion would lose what it does besides: convert a torchvision or timm ResNet with these weights."


PlainBlock = tuple[tuple[int, ...], int]
"""Kernel sizes and output channels of a residual block."""


def build_plain_resnet(
    depth: int,
    num_classes: int = 1000,
    *,
    weights: Weights | None = None,
    block: str = "standard",
    base_channels: int = 64,
    **kw: Any,
) -> PlainResNet:
    """The ResNet of `depth` layers, with torchvision's architecture and names: the control of an ER-ResNet.

    Convolutions and classifier start with the weights that the ER-ResNet has after the same `torch.manual_seed`, so
    that the two differ in their shortcuts alone.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: outputs of the classifier.
        weights: a state dict, or the path of a file with one, of torchvision's ResNet of this depth.
        block: "standard", or "er133" for the residual blocks of the ER-ResNet of that name.
        base_channels: channels of the stem.
        **kw: further arguments of `ERResNet` that are not about its shortcuts: in_channels, drop_rate.

    Raises:
        ValueError: a depth that is none of these, or weights that do not fit.
        FileNotFoundError: `weights` names no file.
    """
    if depth not in LAYERS:
        raise ValueError(f"depth={depth!r}; expected one of {', '.join(map(str, LAYERS))}")
    er = ERResNet(FAMILY[depth], LAYERS[depth], num_classes, block=block, base_channels=base_channels, **kw)
    model = PlainResNet(er, lambda name, er_block: PlainResidualBlock(er_block, shortcut=True))
    if weights is not None:
        load_torchvision_state_dict(model, read_weights(weights))
    return model


def check_plain_resnet(model: nn.Module) -> list[list[PlainBlock]]:
    """The blocks of the four stages of a plain ResNet: all basic or all bottlenecks, channels doubling from stage to
    stage. Raises ValueError for another network, and names the module that differs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model is a TorchScript module ({getattr(model, 'original_name', type(model).__name__)}): convert the "
            "network that was scripted or traced"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled by torch.compile: convert model._orig_mod, and compile the result")
    missing = [name for name in _NEEDED if not isinstance(getattr(model, name, None), nn.Module)]
    if missing:
        raise ValueError(
            f"model ({type(model).__name__}) has no {', '.join(missing)}: expected a ResNet with torchvision's module "
            "names. Of a wrapped model pass the network itself, e.g. model.module"
        )
    _check_lost(type(model).__name__, model)
    stem = [module for module in model.get_submodule("conv1").modules() if isinstance(module, nn.Conv2d)]
    if not stem:
        raise ValueError(f"conv1 must be a Conv2d, or a sequence with some, got {model.get_submodule('conv1')}")
    _check_bn("bn1", model.get_submodule("bn1"), stem[-1])
    for name, child in model.named_children():
        if name in ("avgpool", "global_pool"):
            average = isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1))
            if not average and getattr(child, "pool_type", None) != "avg":
                raise ValueError(f"{name} must average each map to one value, got {child}")
            _check_lost(name, child)
        elif name not in _NEEDED:
            _check_extra(name, child)
    stages = []
    for name in STAGE_NAMES:
        stage = model.get_submodule(name)
        _check_lost(name, stage)
        children = enumerate(stage.named_children())
        stages.append([_check_block(f"{name}.{child}", block, opening=k == 0) for k, (child, block) in children])
        if not stages[-1]:
            raise ValueError(f"{name} has no blocks")
    kinds = {kernels for blocks in stages for kernels, _ in blocks}
    if len(kinds) > 1:
        raise ValueError(f"the blocks of model differ in kind: kernel sizes {sorted(kinds)}")
    channels = [blocks[0][1] for blocks in stages]
    if channels != [channels[0] * 2**k for k in range(len(STAGE_NAMES))]:
        raise ValueError(f"the stages of a ResNet double in channels, these have {channels}")
    return stages


def _check_lost(name: str, module: nn.Module) -> None:
    """Refuse what a module that is not taken over holds: hooks, and tensors of its own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks):
        raise ValueError(f"{name} has hooks, which the result would not have: remove them, and register them there")
    tensors = [key for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None]
    if tensors:
        raise ValueError(f"{name} has tensors of its own ({', '.join(tensors)}), which a plain ResNet has not")


def _check_block(name: str, block: nn.Module, *, opening: bool) -> PlainBlock:
    _check_lost(name, block)
    convs = {child: module for child, module in block.named_children() if re.fullmatch(r"conv\d", child)}
    bns = {f"bn{child[4:]}" for child in convs}
    for child, module in block.named_children():
        if child in convs:
            _check_conv(f"{name}.{child}", module, keeps_size=not opening)
        elif child in bns:
            _check_bn(f"{name}.{child}", module, convs[f"conv{child[2:]}"])
        elif not (opening and child == "downsample"):
            _check_extra(f"{name}.{child}", module, opening=opening)
    kernels = tuple(module.kernel_size[0] for module in convs.values() if isinstance(module, nn.Conv2d))
    absent = [bn for bn in sorted(bns) if not isinstance(getattr(block, bn, None), nn.BatchNorm2d)]
    if kernels not in _KERNELS or absent:
        raise ValueError(
            f"{name} ({type(block).__name__}) has convolutions of sizes {kernels} and lacks {absent or 'nothing'}: "
            "expected 3, 3 or 1, 3, 1, each with its bn"
        )
    first, last = convs["conv1"], convs[f"conv{len(convs)}"]
    assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
    strided = any(module.stride != (1, 1) for module in convs.values() if isinstance(module, nn.Conv2d))
    changes = strided or first.in_channels != last.out_channels
    if changes and not isinstance(getattr(block, "downsample", None), nn.Module):
        raise ValueError(f"{name} changes the shape of the map and has no projection `downsample`:\n{block}")
    return kernels, last.out_channels


def _check_conv(name: str, conv: nn.Module, *, keeps_size: bool) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{name} is a {type(conv).__name__}, expected a Conv2d")
    if conv.kernel_size[0] != conv.kernel_size[1]:
        raise ValueError(f"{name} has kernel size {conv.kernel_size}, expected a square one")
    full = tuple(spread * (size - 1) // 2 for spread, size in zip(conv.dilation, conv.kernel_size, strict=True))
    if keeps_size and (conv.stride != (1, 1) or conv.padding not in ("same", full)):
        raise ValueError(f"{name} ({conv}) changes the size of the map; only block 0 of a stage may")


def _check_bn(name: str, bn: nn.Module, conv: nn.Module) -> None:
    if not isinstance(bn, nn.BatchNorm2d):
        hint = "; convert before convert_sync_batchnorm" if isinstance(bn, nn.SyncBatchNorm) else ""
        raise ValueError(f"{name} is a {type(bn).__name__}, expected a BatchNorm2d{hint}")
    if not bn.affine or not bn.track_running_stats:
        raise ValueError(f"{name} must be affine and track running statistics, got {bn}")
    if isinstance(conv, nn.Conv2d) and bn.num_features != conv.out_channels:
        raise ValueError(
            f"{name} has {bn.num_features} channels and its convolution {conv.out_channels} outputs: expected a "
            "BatchNorm behind each convolution, not before it (pre-activation)"
        )


def _check_extra(name: str, module: nn.Module, *, opening: bool = False) -> None:
    """Whatever is no convolution, BatchNorm or projection must be a ReLU, do nothing, or be known to stay a part of the
    branch: attention and stochastic depth behind its last BatchNorm, blurring downsampling in block 0 of a stage.
    """
    child, kind = name.rpartition(".")[2], type(module).__name__
    kinds = {"se": _ATTENTION, "aa": _AA if opening else set(), "drop_path": _DROP_PATH} if "." in name else {}
    if kind in kinds.get(child, ()):
        return
    if not isinstance(module, nn.Identity) and not (
        isinstance(module, nn.ReLU) and re.fullmatch(r"(relu|act)\d?", child)
    ):
        raise ValueError(f"{name} is a {kind}: only plain ResNets with ReLU can be converted{_REASONS.get(child, '')}")
    _check_lost(name, module)


_REASONS = {
    "drop_block": ". It drops parts of maps at random: set its rate to 0",
    "se": f". Of attention, {', '.join(sorted(_ATTENTION))} are converted, behind the last BatchNorm of a branch",
    "aa": f". Of anti-aliasing, {' and '.join(sorted(_AA))} are converted, in block 0 of a stage",
}
"""Why a module of timm's blocks cannot be taken over."""


def check_computes_plain_resnet(model: nn.Module) -> None:
    """Compare `model` in evaluation mode with the plain ResNet of its modules, on one image of 64x64.

    A forward method of its own, hooks that change values or another order of the layers (pre-activation) show here,
    whatever the modules are called. Networks on the meta device hold no values and are not compared. `model`, of which
    `check_plain_resnet` has found the modules, is not modified and draws no random numbers. Raises ValueError if the
    outputs differ, or `model` does not run.
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
    finite = expected.isfinite()  # values that are not finite agree with themselves
    wanted, got = expected[finite].double(), found[finite].double()
    tolerance = 256 * torch.finfo(dtype).eps  # the same layers: only pooling may round differently
    agree = not len(wanted) or bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())
    if not torch.equal(found.isfinite(), finite) or not agree:
        raise ValueError(
            f"model ({name}) computes something else than a plain ResNet of its modules, for instance by "
            f"{name}.forward, hooks, or BatchNorms before their convolutions. {_LOST}"
        )


def _plain_forward(model: nn.Module, x: Tensor) -> Tensor:
    x = plain_stem(model, x)
    for name in STAGE_NAMES:
        for block in model.get_submodule(name).children():
            x = torch.relu(plain_branch(block, x) + plain_shortcut(block, x))
    return plain_head(model, x)


def plain_stem(model: nn.Module, x: Tensor) -> Tensor:
    """The input of stage 1 of a plain ResNet."""
    part = model.get_submodule
    y: Tensor = part("maxpool")(torch.relu(part("bn1")(part("conv1")(x))))
    return y


def plain_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What a block of a plain ResNet adds to its shortcut."""
    modules = dict(block.named_children())
    last = sum(re.fullmatch(r"conv\d", child) is not None for child in modules)
    for k in range(1, last + 1):
        conv = modules[f"conv{k}"]
        x = modules[f"bn{k}"](conv(x))
        x = torch.relu(x) if k < last else x
        if "aa" in modules and isinstance(conv, nn.Conv2d) and conv.kernel_size[0] == 3:
            x = modules.pop("aa")(x)
    return modules["se"](x) if "se" in modules else x


def plain_shortcut(block: nn.Module, x: Tensor) -> Tensor:
    """A block's input, or its projection."""
    downsample = getattr(block, "downsample", None)
    return x if downsample is None else downsample(x)


def plain_head(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of the last stage's map."""
    y: Tensor = model.get_submodule("fc")(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
    return y
