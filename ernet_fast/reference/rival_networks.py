"""What ER-ResNets are measured against: the plain ResNet and DenseNet-121, of PyTorch's modules, never tuned.

Names of modules and the operations are torchvision's, so that state dicts interchange; neither needs torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_DENSE_LAYERS = (6, 12, 24, 16)
_GROWTH = 32


class PlainBlock(nn.Module):
    """y = ReLU(branch(x) + shortcut(x)): two 3x3 convolutions, or 1x1, 3x3, 1x1, whose 3x3 has the stride."""

    def __init__(self, in_channels: int, width: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        channels = width * expansion
        sizes = (3, 3) if expansion == 1 else (1, 3, 1)
        widths = (in_channels, *[width] * (len(sizes) - 1), channels)
        for k, size in enumerate(sizes):
            step = stride if k == sizes.index(3) else 1
            conv = nn.Conv2d(widths[k], widths[k + 1], size, step, padding=size // 2, bias=False)
            self.add_module(f"conv{k + 1}", conv)
            self.add_module(f"bn{k + 1}", nn.BatchNorm2d(widths[k + 1]))
        self.count = len(sizes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, width * expansion, H / stride, W / stride] of x [N, in_channels, H, W]."""
        out = x
        for k in range(1, self.count + 1):
            out = self._modules[f"bn{k}"](self._modules[f"conv{k}"](out))  # type: ignore[misc]
            out = self.relu(out) if k < self.count else out
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class PlainResNet(nn.Module):
    """A ResNet of `depth` layers: 18, 34, 50, 101 or 152; see torchvision's."""

    def __init__(self, depth: int, num_classes: int = 1000, *, base_channels: int = 64) -> None:
        super().__init__()
        if depth not in _LAYERS:
            raise ValueError(f"depth must be one of {sorted(_LAYERS)}, got {depth!r}")
        self.conv1 = nn.Conv2d(3, base_channels, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, expansion = base_channels, 1 if depth < 50 else 4
        for k, num_blocks in enumerate(_LAYERS[depth]):
            blocks = []
            for index in range(num_blocks):
                stride = 2 if k > 0 and index == 0 else 1
                blocks.append(PlainBlock(channels, base_channels * 2**k, expansion=expansion, stride=stride))
                channels = base_channels * 2**k * expansion
            self.add_module(f"layer{k + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for k in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{k}")(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class DenseLayer(nn.Module):
    """Adds 32 channels to the concatenation of all earlier maps of its block."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, 4 * _GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * _GROWTH)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * _GROWTH, _GROWTH, 3, padding=1, bias=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[N, 32, H, W] of the maps [N, C_i, H, W]."""
        x = self.conv1(self.relu1(self.norm1(torch.cat(list(maps), 1))))
        result: Tensor = self.conv2(self.relu2(self.norm2(x)))
        return result


class DenseBlock(nn.Module):
    """Dense layers `denselayer1` ..., each of which reads all maps before it."""

    def __init__(self, in_channels: int, count: int) -> None:
        super().__init__()
        for k in range(count):
            self.add_module(f"denselayer{k + 1}", DenseLayer(in_channels + k * _GROWTH))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C + 32 * layers, H, W] of x [N, C, H, W]."""
        maps = [x]
        for layer in self.children():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class DenseNet121(nn.Module):
    """DenseNet-121 (Huang et al., CVPR 2017), which the ERNet paper names as its rival; see torchvision's."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 64, 7, 2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(64))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, padding=1))
        channels = 64
        for k, count in enumerate(_DENSE_LAYERS, start=1):
            self.features.add_module(f"denseblock{k}", DenseBlock(channels, count))
            channels += count * _GROWTH
            if k < len(_DENSE_LAYERS):
                self.features.add_module(f"transition{k}", _transition(channels))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = torch.relu_(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 1)), 1))
        return logits


def _transition(channels: int) -> nn.Sequential:
    made = nn.Sequential()
    made.add_module("norm", nn.BatchNorm2d(channels))
    made.add_module("relu", nn.ReLU(inplace=True))
    made.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
    made.add_module("pool", nn.AvgPool2d(2, 2))
    return made


def _initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """As torchvision does: He's for convolutions, outputs counted ("fan_out") in ResNets and inputs in DenseNets."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
