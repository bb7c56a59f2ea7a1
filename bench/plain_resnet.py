"""The plain ResNet of torch modules that ER-ResNets are timed against: the bottleneck nets, torchvision's layout."""

from __future__ import annotations

from torch import Tensor, nn

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """y = ReLU(bn(conv(ReLU(bn(conv(ReLU(bn(conv(x)))))))) + shortcut(x)); the stride is that of the 3x3."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def plain_resnet(depth: int, num_classes: int = 1000, *, base_channels: int = 64) -> nn.Sequential:
    """A plain ResNet of 50 or 101 layers, as its stem, stages and head one after the other."""
    channels = base_channels
    stages: list[nn.Module] = []
    for k, num_blocks in enumerate(LAYERS[depth]):
        width = base_channels * 2**k
        blocks = []
        for index in range(num_blocks):
            blocks.append(Bottleneck(channels, width, 2 if k > 0 and index == 0 else 1))
            channels = 4 * width
        stages.append(nn.Sequential(*blocks))
    model = nn.Sequential(
        nn.Conv2d(3, base_channels, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(base_channels),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(channels, num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
