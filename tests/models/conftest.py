from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

TORCHVISION_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class PlainBlock(nn.Module):
    """torchvision's BasicBlock (two convolutions) and Bottleneck (three), by its module names."""

    def __init__(self, in_channels: int, width: int, channels: int, stride: int, *, groups: int = 1) -> None:
        super().__init__()
        bottleneck = channels != width or groups > 1
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, channels, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class PlainResNet(nn.Module):
    """A ResNet with torchvision's module names and forward pass."""

    def __init__(
        self,
        layers: tuple[int, ...] = (2, 2, 1, 1),
        *,
        bottleneck: bool = False,
        num_classes: int = 5,
        in_channels: int = 3,
        base_channels: int = 8,
        widening: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, base_channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = base_channels
        for k, num_blocks in enumerate(layers):
            planes = base_channels * 2**k
            out = planes * (4 if bottleneck else 1)
            blocks = []
            for index in range(num_blocks):
                stride = 2 if k > 0 and index == 0 else 1
                blocks.append(PlainBlock(channels, planes * widening, out, stride, groups=groups))
                channels = out
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Maps are tiny here: more threads only wait for one another, very long where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def plain_resnet() -> Callable[..., PlainResNet]:
    """Builds a small ResNet of torchvision's form."""
    return PlainResNet


@pytest.fixture(scope="session")
def torchvision_shapes() -> Callable[[int], dict[str, tuple[int, ...]]]:
    """Names and shapes of the state dict of torchvision's ResNet of a depth, from its published architecture."""

    def shapes(depth: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}

        def conv(name: str, out: int, inputs: int, size: int) -> None:
            found[f"{name}.weight"] = (out, inputs, size, size)

        def bn(name: str, channels: int) -> None:
            for suffix in ("weight", "bias", "running_mean", "running_var"):
                found[f"{name}.{suffix}"] = (channels,)
            found[f"{name}.num_batches_tracked"] = ()

        conv("conv1", 64, 3, 7)
        bn("bn1", 64)
        inputs = 64
        for k, num_blocks in enumerate(TORCHVISION_LAYERS[depth]):
            planes = 64 * 2**k
            out = planes if depth < 50 else planes * 4
            for index in range(num_blocks):
                name = f"layer{k + 1}.{index}"
                sizes = ((3, planes), (3, out)) if depth < 50 else ((1, planes), (3, planes), (1, out))
                before = inputs
                for j, (size, after) in enumerate(sizes, start=1):
                    conv(f"{name}.conv{j}", after, before, size)
                    bn(f"{name}.bn{j}", after)
                    before = after
                if index == 0 and (k > 0 or depth >= 50):
                    conv(f"{name}.downsample.0", out, inputs, 1)
                    bn(f"{name}.downsample.1", out)
                inputs = out
        found["fc.weight"], found["fc.bias"] = (1000, inputs), (1000,)
        return found

    return shapes
