"""ER-ResNets: torchvision's ResNets with the identity shortcuts of a stage replaced by ER shortcuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.er.norm_relu import batch_norm_relu
from ernet_fast.models.checkpointing import checkpoint_stage
from ernet_fast.models.stage import ERStage
from ernet_fast.models.weights import load_torchvision_state_dict, read_weights

LAYERS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
FAMILY = {depth: "basic" if depth < 50 else "bottleneck" for depth in LAYERS}
EXPANSION = {"basic": 1, "bottleneck": 4}
DEFAULT_GROUPS = 32

Weights = str | PathLike[str] | Mapping[str, Any]


class ERResNet(nn.Module):
    """A ResNet of four ER stages, with torchvision's stem, head, names of parameters and initialisation.

    Args:
        family: "basic" (the 18- and 34-layer nets) or "bottleneck" (50, 101, 152).
        layers: number of blocks of each of the four stages.
        num_classes: outputs of the classifier `fc`; 0 leaves it out, and the network returns pooled features.
        block: "standard" (3x3, 3x3 or 1x1, 3x3, 1x1 by `family`) or "er133" (1x1, 3x3, 3x3 in the family's widths).
        norm: normaliser of the shortcuts, "batch" or "group".
        num_groups: groups of norm="group", default 32; must divide the channels of every stage.
        fused: see `ERStage`; `set_fused` changes it later.
        in_channels: channels of the input images.
        base_channels: channels of the stem; stages are 1, 2, 4, 8 times as wide (times 4 for bottlenecks).
        width_per_group: 64, or 128 for torchvision's wide ResNets ("bottleneck" family only).
        replace_stride_with_dilation: for stages 2, 3 and 4, whether dilation takes the place of the stride.
        drop_rate: dropout before the classifier, 0 <= drop_rate < 1.

    Raises:
        TypeError: a size that is not an int.
        ValueError: any other argument out of its range.
    """

    def __init__(
        self,
        family: str,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        block: str = "standard",
        norm: str = "batch",
        num_groups: int | None = None,
        fused: bool = True,
        in_channels: int = 3,
        base_channels: int = 64,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, base_channels=base_channels, width_per_group=width_per_group)
        _check_sizes(least=0, num_classes=num_classes)
        _check_choices(family, layers, block, norm, width_per_group, replace_stride_with_dilation, drop_rate)
        if norm == "group":
            num_groups = DEFAULT_GROUPS if num_groups is None else num_groups
            _check_groups(num_groups, base_channels * EXPANSION[family])
        self.in_channels = in_channels
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_channels, base_channels, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, dilation = base_channels, 1
        for k, (num_blocks, dilate) in enumerate(zip(layers, (False, *replace_stride_with_dilation), strict=True)):
            planes = base_channels * 2**k
            stride, first_dilation = (1 if k == 0 else 2), dilation
            if dilate:
                stride, dilation = 1, dilation * stride
            stage = ERStage(
                channels,
                planes * EXPANSION[family],
                num_blocks,
                stride=stride,
                block=family if block == "standard" else block,
                width=planes * width_per_group // 64,
                norm=norm,
                num_groups=num_groups,
                fused=fused,
                dilation=dilation,
                first_dilation=first_dilation,
            )
            self.add_module(f"layer{k + 1}", stage)
            channels = planes * EXPANSION[family]
        self.num_features = channels
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.reset_classifier(num_classes)
        self._initialise()

    @property
    def stages(self) -> list[ERStage]:
        """The four stages, layer1 to layer4."""
        return [getattr(self, name) for name in ("layer1", "layer2", "layer3", "layer4")]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One dict a feature level, as in timm: `num_chs`, `reduction` (image size over map size) and `module`."""
        reduction = _total_stride(self.conv1)
        levels = [{"num_chs": self.bn1.num_features, "reduction": reduction, "module": "relu"}]
        reduction *= _total_stride(self.maxpool)
        for k, stage in enumerate(self.stages):
            reduction *= stage.stride
            levels.append({"num_chs": stage.channels, "reduction": reduction, "module": f"layer{k + 1}"})
        return levels

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map [N, num_features, H / 32, W / 32] of images [N, in_channels, H, W]."""
        x = self.maxpool(
            batch_norm_relu(self.conv1(x), self.bn1, self.relu, fused=None if self.stages[0].fused else False)
        )
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        for stage in self.stages:
            x = checkpoint_stage(stage, x) if checkpointing else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a feature map; with `pre_logits` the pooled features [N, num_features]."""
        x = torch.flatten(self.avgpool(x), 1)
        if pre_logits:
            return x
        if self.drop_rate > 0.0:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return self.fc(x)

    def get_classifier(self) -> nn.Module:
        """The last layer, `nn.Linear`, or `nn.Identity` for num_classes = 0."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one of `num_classes` outputs (0: none), on the device of the network."""
        _check_sizes(least=0, num_classes=num_classes)
        self.num_classes = num_classes
        weight = self.conv1.weight if isinstance(self.conv1, nn.Conv2d) else next(self.parameters())
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
        self.fc.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in backward instead of keeping its maps: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def set_fused(self, fused: bool = True) -> None:
        """Choose the one-pass (True) or the plain PyTorch (False) computation of every stage; parameters stay.

        The stem goes with the first stage.
        """
        for module in self.modules():
            if isinstance(module, ERStage):
                module.fused = fused

    def _initialise(self) -> None:
        """Initialise convolutions as torchvision does; BatchNorms and ER weights start at 1 already."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def er_resnet18(
    num_classes: int = 1000,
    *,
    weights: Weights | None = None,
    norm: str = "batch",
    fused: bool = True,
    in_channels: int = 3,
    **kw: Any,
) -> ERResNet:
    """ER-ResNet of 18 layers, 11.69 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(18, num_classes, weights, norm=norm, fused=fused, in_channels=in_channels, **kw)


def er_resnet34(
    num_classes: int = 1000,
    *,
    weights: Weights | None = None,
    norm: str = "batch",
    fused: bool = True,
    in_channels: int = 3,
    **kw: Any,
) -> ERResNet:
    """ER-ResNet of 34 layers, 21.80 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(34, num_classes, weights, norm=norm, fused=fused, in_channels=in_channels, **kw)


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
        fused: compute each block's tail in one pass (True) or with plain PyTorch operators (False).
        in_channels: channels of the input images.
        **kw: further arguments of `ERResNet`: block, num_groups, base_channels, width_per_group,
            replace_stride_with_dilation, drop_rate.

    Raises:
        TypeError, ValueError: an argument out of its range, or weights that do not fit the network.
        FileNotFoundError: `weights` names no file.

    torchvision's `zero_init_residual` is not offered: the shortcuts normalise every map, so a branch of scale 0
    would not start as the identity but at a point where the normaliser's derivative is 1/sqrt(eps).
    """
    return _build(50, num_classes, weights, norm=norm, fused=fused, in_channels=in_channels, **kw)


def er_resnet101(
    num_classes: int = 1000,
    *,
    weights: Weights | None = None,
    norm: str = "batch",
    fused: bool = True,
    in_channels: int = 3,
    **kw: Any,
) -> ERResNet:
    """ER-ResNet of 101 layers, 44.82 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(101, num_classes, weights, norm=norm, fused=fused, in_channels=in_channels, **kw)


def er_resnet152(
    num_classes: int = 1000,
    *,
    weights: Weights | None = None,
    norm: str = "batch",
    fused: bool = True,
    in_channels: int = 3,
    **kw: Any,
) -> ERResNet:
    """ER-ResNet of 152 layers, 60.86 M parameters with 1000 classes; arguments as in `er_resnet50`."""
    return _build(152, num_classes, weights, norm=norm, fused=fused, in_channels=in_channels, **kw)


def _build(depth: int, num_classes: int, weights: Weights | None, **kw: Any) -> ERResNet:
    state = None if weights is None else read_weights(weights)
    model = ERResNet(FAMILY[depth], LAYERS[depth], num_classes, **kw)
    if state is not None:
        load_torchvision_state_dict(model, state)
    return model


def _total_stride(module: nn.Module) -> int:
    """The factor by which the convolutions and poolings in `module` reduce the map."""
    strided = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    factor = 1
    for layer in module.modules():
        if isinstance(layer, strided):
            factor *= layer.stride if isinstance(layer.stride, int) else layer.stride[0]
    return factor


def _check_sizes(*, least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")


def _check_choices(
    family: str,
    layers: Sequence[int],
    block: str,
    norm: str,
    width_per_group: int,
    replace_stride_with_dilation: Sequence[bool],
    drop_rate: float,
) -> None:
    for name, value, choices in (
        ("family", family, tuple(EXPANSION)),
        ("block", block, ("standard", "er133")),
        ("norm", norm, ("batch", "group")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if len(layers) != 4:
        raise ValueError(f"layers must have 4 entries, one a stage, got {list(layers)}")
    for k, num_blocks in enumerate(layers):
        _check_sizes(**{f"layers[{k}]": num_blocks})
    if family == "basic" and width_per_group != 64:
        raise ValueError(f"width_per_group must be 64 for the basic family, got {width_per_group}")
    if len(replace_stride_with_dilation) != 3:
        raise ValueError(
            f"replace_stride_with_dilation must have 3 entries, for stages 2 to 4, got {replace_stride_with_dilation!r}"
        )
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")


def _check_groups(num_groups: int, narrowest: int) -> None:
    """Every stage's channels are a power of two times the first stage's."""
    _check_sizes(num_groups=num_groups)
    if narrowest % num_groups != 0:
        raise ValueError(f"num_groups must divide the {narrowest} channels of stage 1, got {num_groups}")
