"""How fast is the gradient of a convolution's weight against PyTorch's (oneDNN's)?

One row is the weight gradient of one convolution of the ResNets, batch 8, float32, channels-last. `gflops` are those of
the operator: two for each product.

Run: python3 dev.py bench bench_convolution
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from contestants import contestants

# kernel, channels, channels of dy, pixels of x along an axis, stride
CONVOLUTIONS = [
    *((3, 64 << k, 64 << k, 56 >> k, 1) for k in range(4)),
    *((3, 64 << k, 64 << k, 112 >> k, 2) for k in range(1, 4)),
    *((1, 128 << k, 512 << k, 28 >> k, 1) for k in range(3)),
    *((1, 512 << k, 128 << k, 28 >> k, 1) for k in range(3)),
    (1, 256, 512, 56, 2),
]


@contestants("ours", "torch")
@pytest.mark.parametrize("threads", [1, len(os.sched_getaffinity(0))])
@pytest.mark.parametrize(("kernel", "channels", "outputs", "size", "stride"), CONVOLUTIONS)
def test_weight_gradient(interleave, record_row, torch_threads, kernel, channels, outputs, size, stride, threads, who):
    torch_threads(threads)

    def make():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((8, channels, size, size), generator=generator).contiguous(memory_format=torch.channels_last)
        weight = torch.randn((outputs, channels, kernel, kernel), generator=generator)
        weight = weight.contiguous(memory_format=torch.channels_last)
        dy = torch.randn_like(torch.conv2d(x, weight, None, stride, kernel // 2))
        settings = [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
        return {
            "ours": functools.partial(torch.ops.ernet.conv_weight_gradient, dy, x, kernel, stride, kernel // 2),
            "torch": functools.partial(torch.ops.aten.convolution_backward, dy, x, weight, None, *settings),
        }

    figures = interleave(make, rounds=15, budget=3.0).figures("ours")
    if who != "ours":
        return
    out = size // stride
    operations = 2 * 8 * out * out * channels * outputs * kernel * kernel
    record_row(
        "weight gradient of a convolution", **figures, peer="PyTorch", peer_p50=figures["torch_ms"],
        gflops=operations / figures["ours_ms"] / 1e6, target=["ratio_torch >= 1"],
    )  # fmt: skip
