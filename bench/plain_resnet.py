"""The plain ResNet of torch modules that ER-ResNets are timed against: the bottleneck nets, torchvision's layout."""

from __future__ import annotations

from torch import Tensor, nn

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def unit(in_channels: int, channels: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), *[nn.ReLU(inplace=True)] * relu)


class Bottleneck(nn.Module):
    """y = ReLU(bn(conv(ReLU(bn(conv(ReLU(bn(conv(x)))))))) + shortcut(x)); the stride is that of the 3x3."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = 4 * width
        self.branch = nn.Sequential(
            unit(in_channels, width, 1), unit(width, width, 3, stride), unit(width, channels, 1, relu=False)
        )
        projects = stride != 1 or in_channels != channels
        self.shortcut = unit(in_channels, channels, 1, stride, relu=False) if projects else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.shortcut(x)
        return self.relu(out)


def plain_resnet(depth: int, num_classes: int = 1000, *, base_channels: int = 64) -> nn.Sequential:
    """A plain ResNet of 50 or 101 layers: its stem, pooling, stages and head one after the other."""
    channels = base_channels
    stages: list[nn.Module] = []
    for k, num_blocks in enumerate(LAYERS[depth]):
        blocks = []
        for index in range(num_blocks):
            blocks.append(Bottleneck(channels, base_channels * 2**k, 2 if k > 0 and index == 0 else 1))
            channels = 4 * base_channels * 2**k
        stages.append(nn.Sequential(*blocks))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, num_classes))
    return nn.Sequential(unit(3, base_channels, 7, 2), nn.MaxPool2d(3, 2, padding=1), *stages, *head)
