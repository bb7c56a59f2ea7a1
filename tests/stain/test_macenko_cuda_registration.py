"""Which Macenko operators CUDA has, with kernels compiled in and without. Needs no GPU."""

from __future__ import annotations

import pytest
import torch

from ernet_fast import _backend
from ernet_fast.diagnosis import _macenko_on_cuda
from ernet_fast.stain import operators, torch_backend

pytestmark = pytest.mark.skipif(not _backend.extension_available(), reason="the compiled operators are not built")
WITH_KERNELS = (
    "macenko_fit",
    "macenko_reconstruct",
    "macenko_reconstruct_stains",
    "macenko_normalize",
    "macenko_change",
    "macenko_augment",
    "macenko_separate",
)


def has_cuda(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CUDA")


def test_every_operator_is_a_kernel_or_a_composition():
    if torch_backend.cuda_kernels_available():
        assert all(map(has_cuda, WITH_KERNELS)) and not operators.COMPOSED
    else:
        assert {name for name in WITH_KERNELS if has_cuda(name)} == operators.COMPOSED
        assert {"macenko_fit", "macenko_normalize"} == operators.COMPOSED


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_doctor_says_which(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch_backend, "why_no_kernels", lambda device: None)
    if torch_backend.cuda_kernels_available():
        assert _macenko_on_cuda(name) == ("CUDA", "compiled kernels")
    monkeypatch.setattr(torch_backend, "why_no_kernels", lambda device: "no nvcc")
    assert _macenko_on_cuda(name) == ("PyTorch", "batched torch operations; no nvcc")
