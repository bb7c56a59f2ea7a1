"""Small values on their way to a device: dense, page-locked, without waiting; gradients and CPU tensors as they are."""

from __future__ import annotations

import pytest
import torch

from ernet_fast.stain.upload import index_on, to_device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def log(monkeypatch):
    """What is asked of torch, with a device that is not there."""
    found = []
    real = torch.Tensor.to

    def pin_memory(values):
        found.append(("page-locked", values.is_contiguous(), values.dtype))
        return values

    def to(values, *arguments, non_blocking=False):
        if arguments[0] == CUDA:
            found.append(("copy", non_blocking))
            return values
        return real(values, *arguments)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return found


def test_values_go_by_way_of_page_locked_memory(log):
    values = torch.rand(1, 3, 2).expand(4, 3, 2)
    assert torch.equal(to_device(values, CUDA, torch.float64), values.double())
    assert log == [("page-locked", True, torch.float64), ("copy", True)]
    log.clear()
    assert index_on([2, 0], CUDA).tolist() == [2, 0]
    assert log == [("page-locked", True, torch.int64), ("copy", True)]


def test_values_with_gradients_keep_them(log):
    values = torch.rand(3, requires_grad=True)
    assert to_device(values, CUDA) is values
    assert log == [("copy", False)], "page-locking has no gradient"


def test_values_of_the_cpu_stay(log):
    values = torch.rand(3)
    assert to_device(values, torch.device("cpu")) is values and log == []
    assert to_device(values, torch.device("cpu"), torch.float64).dtype == torch.float64
