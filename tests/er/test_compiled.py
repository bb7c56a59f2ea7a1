"""torch.compile and torch.export: no graph break, the same values, gradients and running statistics as eager."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from er_cases import maps_like
from stage_cases import Tails
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ernet_fast import ERShortcut, ERStage, er_shortcut_sum
from ernet_fast.models import ERResNet

pytestmark = pytest.mark.slow

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # float64, a few hundred operations deep


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(norm: str = "batch", groups: int | None = None) -> ERResNet:
    torch.manual_seed(0)
    return ERResNet("basic", (2, 3, 1, 1), 4, base_channels=6, norm=norm, num_groups=groups).double()


def image(batch: int = 2, size: int = 33) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def results(model: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    y = call(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {"y": y.detach(), **{f"x{i}": leaf.grad for i, leaf in enumerate(leaves)}}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **ROUNDING)


def compiled_and_eager(model: nn.Module, inputs: list[Tensor]) -> None:
    """In one graph, compiled once: without a break."""
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        model.zero_grad(), eager.zero_grad()
        assert_same(results(model, call, inputs), results(eager, eager, inputs))
    assert (counter.frame_count, len(counter.graphs)) == (1, 1)


MODES = [("batch", None, True), ("batch", None, False), ("group", 3, True)]


@pytest.mark.parametrize(("norm", "groups", "training"), MODES)
def test_network(norm, groups, training):
    compiled_and_eager(network(norm, groups).train(training), [image()])


@pytest.mark.parametrize(("norm", "groups", "training"), MODES)
def test_shortcut(norm, groups, training):
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = ERShortcut(6, 2, norm=norm, num_groups=groups)

        def forward(self, *xs: Tensor) -> Tensor:
            return self.shortcut(xs)

    xs = maps_like((2, 6, 5, 4), 3, torch.float64, torch.channels_last)
    compiled_and_eager(Alone().double().train(training), xs)


def test_function_and_other_batches():
    """Batches of other sizes need at most one more compilation, for sizes that vary."""
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda xs, w: er_shortcut_sum(xs, w, relu=True), backend=counter, fullgraph=True)
    weight = torch.randn(2, 6, dtype=torch.float64)
    for batch in (2, 3, 5, 7):
        xs = maps_like((batch, 6, 5, 4), 3, torch.float64, torch.contiguous_format)
        torch.testing.assert_close(call(xs, weight), er_shortcut_sum(xs, weight, relu=True))
    assert counter.frame_count <= 2


def test_bad_arguments_of_a_compiled_function():
    xs = maps_like((2, 6, 5, 4), 3, torch.float32, torch.contiguous_format)
    call = torch.compile(er_shortcut_sum, backend="aot_eager")
    with pytest.raises(Exception, match=r"weight has shape \(3, 6\); expected \(2, 6\)"):
        call(xs, torch.ones(3, 6))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="the default backend needs a C++ compiler")
def test_generated_code():
    """The whole way, through the code that the default backend generates."""
    model = Tails(2).double()
    eager = copy.deepcopy(model)
    zs = maps_like((2, 6, 3, 5), 2, torch.float64, torch.contiguous_format)
    assert_same(results(model, torch.compile(model, fullgraph=True), zs), results(eager, eager, zs))


def test_autocast():
    torch.manual_seed(0)
    stage = ERStage(6, 8, 3)
    eager, x = copy.deepcopy(stage), torch.randn(2, 6, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(stage, backend="aot_eager", fullgraph=True)(x)
        expected = eager(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert float((found - expected).detach().float().norm() / expected.detach().float().norm()) < 8 * eps


def test_second_derivative_of_a_compiled_stage_is_an_error():
    stage = torch.compile(ERStage(6, 6, 2, block="basic").double(), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(("norm", "groups", "training"), MODES)
def test_export(norm, groups, training):
    """The exported program, for any batch, also moves the running statistics."""
    model = network(norm, groups).train(training)
    eager = copy.deepcopy(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (image(3),), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "ernet.weighted_sum.default" in names
    exported = program.module()
    for size in (3, 2, 5):
        torch.testing.assert_close(exported(image(size)), eager(image(size)), **ROUNDING)
    buffers = dict(eager.named_buffers())
    for name, buffer in exported.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], **ROUNDING)


def test_export_of_tails_keeps_the_operators():
    """Of a stage of L maps: L - 1 weighted sums, and L moments in training."""
    module = Tails(4).double()
    zs = tuple(maps_like((2, 6, 3, 5), 4, torch.float64, torch.contiguous_format))
    program = torch.export.export(module, zs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("ernet.weighted_sum.default") == 3 and targets.count("ernet.channel_moments.default") == 4
