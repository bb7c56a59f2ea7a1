"""The naive ER network: one normaliser module for every pair (l, i), composed word for word in plain PyTorch.

Oracle of the tests and baseline of the speed figures for `ernet_fast.models`; it is never tuned and shares no code
with them. A stage with maps x_0 ... x_{L-1} computes, with y_0 = x_0,

    x_l = H_l(y_{l-1})                                  branch output after its last BatchNorm
    y_l = ReLU( x_l + sum_{i<l} w_{l,i} * N_{l,i}(x_i) )

which is equation (10) of the ERNet paper (Chandana Mani & Kamalakannan, ELCVIA) with ER = W x N.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_KERNELS = {"basic": (3, 3), "bottleneck": (1, 3, 1), "er133": (1, 3, 3)}


class NaivePairShortcuts(nn.Module):
    """The sum of block l: `x_l + sum_i weight[i] * N_{l,i}(x_i)` with `num_maps` = l normaliser modules of its own.

    Shapes: maps [N, C, H, W]; weight [num_maps, C], initially 1.
    """

    def __init__(self, channels: int, num_maps: int, *, norm: str = "batch", num_groups: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_maps, channels))
        self.norms = nn.ModuleList(_pair_norm(channels, norm, num_groups) for _ in range(num_maps))

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """The sum over `num_maps` + 1 maps, the last one being the branch output; no ReLU."""
        out = xs[-1]
        for i, normalise in enumerate(self.norms):
            out = out + self.weight[i].view(1, -1, 1, 1) * normalise(xs[i])
        return out


class NaiveBlock(nn.Module):
    """Block l of a stage; l = 0 is the projection block ("Block A"), l >= 1 an ER block ("Block B").

    The branch is 3x3, 3x3 ("basic"), 1x1, 3x3, 1x1 ("bottleneck") or 1x1, 3x3, 3x3 ("er133"), each convolution with
    BatchNorm and ReLU between them; the stride sits on the first 3x3.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        index: int,
        block: str,
        stride: int = 1,
        norm: str = "batch",
        num_groups: int | None = None,
    ) -> None:
        super().__init__()
        kernels = _KERNELS[block]
        strides = [stride if k == kernels.index(3) else 1 for k in range(len(kernels))]
        channels = [in_channels] + [width] * (len(kernels) - 1) + [out_channels]
        self.num_convs = len(kernels)
        for k, size in enumerate(kernels):
            conv = nn.Conv2d(channels[k], channels[k + 1], size, strides[k], padding=size // 2, bias=False)
            self.add_module(f"conv{k + 1}", conv)
            self.add_module(f"bn{k + 1}", nn.BatchNorm2d(channels[k + 1]))
        self.downsample = self.shortcut = None
        if index > 0:
            self.shortcut = NaivePairShortcuts(out_channels, index, norm=norm, num_groups=num_groups)
        elif stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, y: Tensor, maps: list[Tensor]) -> Tensor:
        """y_l of y_{l-1}; the map x_l is appended to `maps`."""
        x = y
        for k in range(1, self.num_convs + 1):
            x = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(x))
            if k < self.num_convs:
                x = torch.relu(x)
        if self.shortcut is None:
            x_0 = torch.relu(x + (y if self.downsample is None else self.downsample(y)))
            maps.append(x_0)
            return x_0
        maps.append(x)
        return torch.relu(self.shortcut(maps))


class NaiveERStage(nn.Module):
    """Blocks "0" ... "L-1" whose later blocks read every earlier map of the stage."""

    def __init__(
        self, in_channels: int, width: int, out_channels: int, num_blocks: int, *, stride: int = 1, **kw: Any
    ) -> None:
        super().__init__()
        for index in range(num_blocks):
            block = NaiveBlock(in_channels, width, out_channels, index=index, stride=stride, **kw)
            self.add_module(str(index), block)
            in_channels, stride = out_channels, 1

    def forward(self, x: Tensor) -> Tensor:
        """y_{L-1} [N, out_channels, H / stride, W / stride] of x [N, in_channels, H, W]."""
        maps: list[Tensor] = []
        for block in self.children():
            x = block(x, maps)
        return x


class NaiveERResNet(nn.Module):
    """torchvision's ResNet stem and head around four naive ER stages.

    Args:
        layers: number of blocks of each stage.
        block: "basic", "bottleneck" or "er133".
        num_classes: outputs of the last linear layer.
        expansion: output channels of a block over its width; default 1 for "basic", else 4.
        norm: "batch" or "group" (with `num_groups`), the normaliser of the shortcuts.
        num_groups: groups of norm="group"; default 32.
        in_channels: channels of the input images.
        base_channels: channels of the stem; the stages have 1, 2, 4 and 8 times as many, times `expansion`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        block: str,
        num_classes: int = 1000,
        *,
        expansion: int | None = None,
        norm: str = "batch",
        num_groups: int | None = None,
        in_channels: int = 3,
        base_channels: int = 64,
    ) -> None:
        super().__init__()
        expansion = (1 if block == "basic" else 4) if expansion is None else expansion
        if norm == "group" and num_groups is None:
            num_groups = 32
        self.conv1 = nn.Conv2d(in_channels, base_channels, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = base_channels
        options: dict[str, Any] = {"block": block, "norm": norm, "num_groups": num_groups}
        for k, num_blocks in enumerate(layers):
            width, stride = base_channels * 2**k, 1 if k == 0 else 2
            stage = NaiveERStage(channels, width, width * expansion, num_blocks, stride=stride, **options)
            self.add_module(f"layer{k + 1}", stage)
            channels = width * expansion
        self.num_stages = len(layers)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for k in range(self.num_stages):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.fc(x.mean((2, 3)))


def naive_er_resnet(depth: int, num_classes: int = 1000, *, block: str = "standard", **kw: Any) -> NaiveERResNet:
    """The naive network of 18, 34, 50, 101 or 152 layers.

    Args:
        depth: number of layers.
        num_classes: outputs of the last linear layer.
        block: "standard" or "er133", as in `ernet_fast.er_resnet50`.
        **kw: norm, num_groups, in_channels and base_channels of `NaiveERResNet`.

    Raises:
        ValueError: an unknown depth or block.
    """
    if depth not in _LAYERS:
        raise ValueError(f"depth must be one of {sorted(_LAYERS)}, got {depth!r}")
    if block not in ("standard", "er133"):
        raise ValueError(f"block must be 'standard' or 'er133', got {block!r}")
    kind, expansion = ("basic", 1) if depth < 50 else ("bottleneck", 4)
    return NaiveERResNet(_LAYERS[depth], kind if block == "standard" else block, num_classes, expansion=expansion, **kw)


def state_dict_from_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The naive network's state dict for that of an `ernet_fast.models` network (or stage).

    Row i of an `ERShortcut`'s running statistics [num_maps, C] becomes those of the pair's own normaliser;
    everything else has the same name in both. Tensors are cloned.
    """
    naive: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*shortcut)\.(running_mean|running_var|num_batches_tracked)", key)
        if match is None:
            naive[key] = value.clone()
            continue
        prefix, name = match.groups()
        for i in range(len(state[f"{prefix}.weight"])):
            naive[f"{prefix}.norms.{i}.{name}"] = (value[i] if value.ndim else value).clone()
    return naive


def state_dict_to_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `state_dict_from_fused`: statistics of the pairs of a block stacked to [num_maps, C].

    Raises:
        ValueError: the pairs of one block have counted different numbers of batches, which one shared count cannot
            hold.
    """
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*shortcut)\.norms\.(\d+)\.(\w+)", key)
        if match is None:
            fused[key] = value.clone()
            continue
        prefix, name = match[1], match[3]
        rows = torch.stack([state[f"{prefix}.norms.{i}.{name}"] for i in range(len(state[f"{prefix}.weight"]))])
        if rows.ndim == 1 and bool((rows != rows[0]).any()):
            raise ValueError(f"the pairs of {prefix} have counted different numbers of batches: {rows.tolist()}")
        fused[f"{prefix}.{name}"] = rows if rows.ndim > 1 else rows[0].clone()
    return fused


def _pair_norm(channels: int, norm: str, num_groups: int | None) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels, affine=False)
    if norm == "group":
        if num_groups is None:
            raise ValueError("norm='group' needs num_groups")
        return nn.GroupNorm(num_groups, channels, affine=False)
    raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}")
