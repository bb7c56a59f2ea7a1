"""The operator that takes gradients of convolution weights, against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from other_isa import ISAS, run_on
from torch import Tensor

from ernet_fast import _backend

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))

# samples, channels of x and dy, height, width, kernel, stride, padding
SHAPES = [
    (2, 64, 64, 56, 56, 3, 1, 1),  # several blocks of a sample
    (5, 32, 65, 7, 7, 3, 1, 1),  # several samples a block, the last one short; tiles of every kind of rest
    (3, 96, 13, 9, 12, 3, 2, 1),
    (2, 32, 1, 6, 5, 3, 1, 0),
    (1, 64, 24, 5, 5, 5, 1, 4),  # more border than map
    (2, 32, 40, 11, 8, 4, 3, 2),
    (9, 32, 8, 1, 1, 1, 1, 0),
    (2, 64, 31, 15, 15, 1, 2, 0),
    (1, 32, 12, 1, 300, 1, 1, 0),  # a row longer than a block
    (1, 32, 3, 2, 400, 3, 1, 1),
    (0, 32, 5, 4, 4, 3, 1, 1),
]


def maps(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int, int, int]:
    n, c, k, height, width, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn((n, c, height, width), generator=generator).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, x.new_zeros((k, c, kernel, kernel)), None, stride, padding)
    dy = torch.randn(y.shape, generator=generator).contiguous(memory_format=torch.channels_last)
    return dy, x, kernel, stride, padding


def gradient(dy: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """By PyTorch, in the dtype of the maps."""
    weight = x.new_zeros((dy.shape[1], x.shape[1], kernel, kernel))
    settings = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *settings)[1]


def check(shape: tuple[int, ...]) -> None:
    dy, x, *settings = maps(shape)
    found = torch.ops.ernet.conv_weight_gradient(dy, x, *settings)
    expected = gradient(dy.double(), x.double(), *settings)
    size = gradient(dy.double().abs(), x.double().abs(), *settings)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    # sums of at most 400 products a block: what a plain sum of 32 may lose
    assert ((found.double() - expected).abs() <= 32 * 2**-24 * size + 1e-30).all()


def check_all() -> None:
    for shape in SHAPES:
        check(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape):
    check(shape)


@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets(isa):
    run_on(isa, __file__, "tests.check_all()")


def test_same_bits_with_any_number_of_threads():
    arguments = maps((3, 128, 40, 14, 14, 3, 1, 1))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.ernet.conv_weight_gradient(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_operator_check():
    torch.library.opcheck(torch.ops.ernet.conv_weight_gradient.default, maps((2, 32, 5, 6, 6, 3, 1, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dy, x: (dy.contiguous(), x, 3, 1, 1), "dy must be channels-last"),
        (lambda dy, x: (dy, x.contiguous(), 3, 1, 1), "x must be channels-last"),
        (lambda dy, x: (dy, x.double(), 3, 1, 1), "x must be float32"),
        (lambda dy, x: (dy[0], x, 3, 1, 1), "dy must have 4 dimensions"),
        (lambda dy, x: (dy, x, 3, 2, 1), r"dy \[2, 8, 6, 6\] is no gradient of a convolution of x \[2, 32, 6, 6\]"),
        (lambda dy, x: (dy[:1], x, 3, 1, 1), "is no gradient of a convolution"),
        (lambda dy, x: (dy, x[:, :31].contiguous(memory_format=torch.channels_last), 3, 1, 1), "x has 31 channels"),
        (lambda dy, x: (dy, x, 3, 0, 1), "kernel 3, stride 0 and padding 1 must be positive"),
        (lambda dy, x: (dy, x, 1, 1, 1), "and the padding less than the kernel"),
    ],
)
def test_other_arguments_are_refused(change, message):
    dy, x, *_ = maps((2, 32, 8, 6, 6, 3, 1, 1))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ernet.conv_weight_gradient(*change(dy, x))
