"""Makes plain_networks importable: tests are collected with importmode=importlib."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from plain_networks import PlainResNet

TORCHVISION_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


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
