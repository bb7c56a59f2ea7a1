"""Convolutions of blocks, with the weight gradient by our operator or by the module: the same results in every mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ernet_fast import _backend, er_resnet18
from ernet_fast.models import convolution as module
from ernet_fast.models.convolution import takes_gradients

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    """On every CPU, with several threads."""
    monkeypatch.setattr(module, "_WANTED", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def conv_of(*args: int, **kw: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*args, bias=False, **kw)


def convolution(x: Tensor, conv: nn.Module, **kw: bool) -> Tensor:
    """As a block calls it."""
    return module.convolution(x, conv) if takes_gradients(x, **kw) else conv(x)


def is_ours(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_ConvolutionBackward"


CONVS = {
    "3x3": lambda: conv_of(32, 24, 3, padding=1),
    "strided": lambda: conv_of(32, 24, 3, 2, padding=1),
    "1x1": lambda: conv_of(32, 24, 1),
    "strided_1x1": lambda: conv_of(32, 24, 1, 2),
}


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONVS)
def test_same_results_as_the_module(name, weight_layout):
    conv, x = CONVS[name]().to(memory_format=weight_layout), image(3, 32, 14, 15)
    y, expected = convolution(x, conv), conv(x)
    assert is_ours(y) and torch.equal(y, expected)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, conv.weight], dy, retain_graph=True)
    wanted = torch.autograd.grad(expected, [x, conv.weight], dy)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-4)  # of values up to 100
    assert torch.equal(*torch.autograd.grad(y, [conv.weight], dy.contiguous(), retain_graph=True), found[1])
    assert torch.equal(*torch.autograd.grad(y, [x], dy), found[0])


def test_frozen_input():
    conv, x = CONVS["3x3"](), image(2, 32, 9, 9).detach()
    y = convolution(x, conv)
    y.sum().backward()
    expected = torch.autograd.grad(conv(x).sum(), [conv.weight])[0]
    assert is_ours(y)
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_second_derivative_and_batched_gradients():
    conv, x = CONVS["3x3"](), image(2, 32, 9, 9)

    def second(y: Tensor) -> Tensor:
        first = torch.autograd.grad(y.square().sum(), [x, conv.weight], create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), [x])[0]

    torch.testing.assert_close(second(convolution(x, conv)), second(conv(x)), rtol=1e-4, atol=1e-3)
    dys = torch.randn(2, *conv(x).shape)
    batched = torch.autograd.grad(convolution(x, conv), [x, conv.weight], dys, is_grads_batched=True)
    for found, one in zip(
        batched, torch.autograd.grad(conv(x), [x, conv.weight], dys, is_grads_batched=True), strict=True
    ):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=2e-5)


def hooked() -> nn.Conv2d:
    conv = CONVS["3x3"]()
    conv.register_forward_hook(lambda *_: None)
    return conv


def frozen() -> nn.Conv2d:
    return CONVS["3x3"]().requires_grad_(False)


OTHERS = {
    "hook": (hooked, {}),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(CONVS["3x3"]()), {}),
    "frozen": (frozen, {}),
    "bias": (lambda: nn.Conv2d(32, 8, 3, padding=1), {}),
    "groups": (lambda: conv_of(32, 32, 3, padding=1, groups=2), {}),
    "dilation": (lambda: conv_of(32, 8, 3, padding=2, dilation=2), {}),
    "reflection": (lambda: conv_of(32, 8, 3, padding=1, padding_mode="reflect"), {}),
    "same": (lambda: conv_of(32, 8, 3, padding="same"), {}),
    "oblong": (lambda: conv_of(32, 8, (3, 1), padding=(1, 0)), {}),
    "strides": (lambda: conv_of(32, 8, 3, (1, 2), padding=1), {}),
    "wide kernel": (lambda: conv_of(32, 8, 7, padding=3), {}),
    "channels": (lambda: conv_of(40, 8, 3, padding=1), {"channels": 40}),
    "large 1x1": (lambda: conv_of(32, 8, 1), {"size": 29}),
    "double": (lambda: conv_of(32, 8, 3, padding=1).double(), {"dtype": torch.float64}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_to_the_module(name):
    make, how = OTHERS[name]
    conv, size = make(), how.get("size", 9)
    x = image(2, how.get("channels", 32), size, size, dtype=how.get("dtype", torch.float32))
    y = convolution(x, conv)
    assert not is_ours(y) and torch.equal(y, conv(x))


def test_other_calls_are_left_to_the_module(monkeypatch):
    conv, x = CONVS["3x3"](), image(2, 32, 9, 9)
    assert not is_ours(convolution(x.detach().contiguous(), conv))
    assert not is_ours(convolution(x, conv, fused=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolution(x, conv).dtype == torch.bfloat16
    with torch.no_grad():
        assert not convolution(x, conv).requires_grad
    tangent = torch.func.jvp(lambda x: convolution(x, conv), (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, conv(torch.ones_like(x)))
    with pytest.raises(RuntimeError, match="channels"):
        convolution(x, CONVS["3x3"]().requires_grad_(True).__class__(64, 8, 3, bias=False))
    torch.set_num_threads(1)
    assert not is_ours(convolution(x, CONVS["1x1"]())) and is_ours(convolution(x, conv))
    monkeypatch.setattr(module, "_WANTED", False)
    assert not is_ours(convolution(x, conv))


def gradients(model: nn.Module) -> list[Tensor]:
    x = image(2, 3, 64, 64)
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


def test_network(monkeypatch):
    """An ER-ResNet-18 with and without it: gradients as near as sums in another order are."""
    torch.manual_seed(0)
    model = er_resnet18(num_classes=4, base_channels=32).to(memory_format=torch.channels_last).train()
    calls = []
    apply = module._Convolution.apply
    monkeypatch.setattr(module._Convolution, "apply", lambda *args: (calls.append(args), apply(*args))[1])
    ours = gradients(model)
    assert len(calls) == 19  # all but the stem's
    monkeypatch.setattr(module, "_WANTED", False)
    for found, expected in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_variable(monkeypatch):
    for text, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("ERNET_CONV", text)
        assert module._wanted() == expected
    monkeypatch.setenv("ERNET_CONV", "yes")
    with pytest.raises(ValueError, match="environment variable ERNET_CONV=yes; expected auto, 0 or 1."):
        module._wanted()
