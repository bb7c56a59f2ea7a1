"""Compiled autograd (`torch._dynamo.config.compiled_autograd`): the gradients of eager backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from path_cases import NORMS, assert_same, maps, stage, step, weighted
from torch import Tensor

from ernet_fast import er_shortcut_sum


@pytest.fixture
def compiled_backward() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """A context in which backward passes are compiled, as those within a function of torch.compile are."""
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    torch._dynamo.reset()
    yield lambda: compiled_autograd._enable(torch.compile(backend="eager"))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_training_steps(norm, compiled_backward):
    found, expected = stage(norm, 3), stage(norm, 3)
    for seed in range(2):
        with compiled_backward():
            left = step(found, maps(seed))
        assert_same(left, step(expected, maps(seed)))


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_passes_over_a_part_of_a_retained_graph(norm, compiled_backward):
    """A pass that ends within the stage leaves nothing that a later one finds."""
    made, x = stage(norm, 3), maps().requires_grad_()
    inner: list[Tensor] = []
    made[2].conv1.register_forward_hook(lambda module, inputs, output: inner.append(output))
    y = made(x)
    wanted = [[inner[0]], [x, *made.parameters()], [x]]
    expected = [torch.autograd.grad(weighted(y), tensors, retain_graph=True) for tensors in wanted]
    with compiled_backward():
        found = [torch.autograd.grad(weighted(y), tensors, retain_graph=True) for tensors in wanted]
    for those, these in zip(found, expected, strict=True):
        for a, b in zip(those, these, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_shortcut_sum(compiled_backward):
    xs = [maps(seed).requires_grad_() for seed in range(3)]
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4).requires_grad_()
    expected = torch.autograd.grad(weighted(er_shortcut_sum(xs, weight)), [*xs, weight])
    y = weighted(er_shortcut_sum(xs, weight))
    with compiled_backward():
        found = torch.autograd.grad(y, [*xs, weight])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
