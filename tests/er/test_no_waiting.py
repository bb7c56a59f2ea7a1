"""Nothing in the Python of a forward or backward pass reads a value of a tensor, which on a GPU would wait for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from stage_cases import NORMS, STEPS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ernet_fast import ERShortcut, er_shortcut_sum
from ernet_fast.er import epilogue
from ernet_fast.models import ERResNet


@pytest.fixture(autouse=True)
def no_values() -> Iterator[None]:
    """Tensors have no values here: what asks for one raises, and a look at their memory warns."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_asking_for_a_value_raises():
    with pytest.raises(DataDependentOutputException):
        float(torch.ones(()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "groups"), NORMS)
def test_training_and_evaluation(monkeypatch, norm, groups, training):
    if norm.endswith(STEPS):  # as on GPUs
        monkeypatch.setattr(epilogue, "block_operator_supports", lambda x, group: False)
    norm = norm.removesuffix(STEPS)
    model = ERResNet("basic", (2, 3, 1, 1), 4, base_channels=6, norm=norm, num_groups=groups).train(training)
    model(torch.randn(2, 3, 33, 33)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_shortcut(training, momentum):
    """Also for cumulative averages, whose momentum is a number on the device."""
    module = ERShortcut(6, 2, momentum=momentum).train(training)
    module([torch.randn(2, 6, 3, 3, requires_grad=True) for _ in range(3)]).sum().backward()
    assert module.weight.grad.shape == (2, 6)


@pytest.mark.parametrize("training", [True, False])
def test_function(training):
    xs = [torch.randn(2, 6, 3, 3, requires_grad=True) for _ in range(3)]
    mean, var = [torch.zeros(6) for _ in range(2)], [torch.ones(6) for _ in range(2)]
    er_shortcut_sum(xs, torch.ones(2, 6), running_mean=mean, running_var=var, training=training).sum().backward()
    assert all(x.grad is not None for x in xs)
