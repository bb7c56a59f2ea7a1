"""When the Triton operators are registered, without importing Triton. Each case is a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernet_fast.er.triton.map_launch import on_device_of

ROOT = Path(__file__).resolve().parent.parent.parent

# What a CUDA build of torch looks like to the library before it meets a CUDA tensor. The operators' schemas, fake
# kernels and autograd must be there whether or not the binary is; meta tensors run the fake kernels.
NAMES = (
    "channel_moments",
    "weighted_sum",
    "weighted_dot",
    "map_dots",
    "block_coefficients",
    "map_coefficients_backward",
)

WITH_CUDA = """
import sys, torch
torch.version.cuda = "13.0"
import ernet_fast
from ernet_fast import _backend
from ernet_fast.er import operators
assert "triton" not in sys.modules
assert _backend.extension_available() is not DISABLED
for name in NAMES:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CUDA"), name
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CPU") is not DISABLED, name
class OnCuda:
    device = torch.device("cuda")
assert operators.supports_device(OnCuda()) and operators.supports_device(torch.ones(1)) is not DISABLED
x = torch.empty(2, 3, 4, 5, device="meta", requires_grad=True)
a = torch.empty(2, 3, device="meta", requires_grad=True)
y = operators.weighted_sum([x, x], a, None, True)
assert y.shape == x.shape and y.requires_grad
y.sum().backward()
assert x.grad.shape == x.shape and a.grad.shape == a.shape
maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)]
out = ernet_fast.er_shortcut_sum(maps, torch.ones(1, 3))
torch.testing.assert_close(out, ernet_fast.reference.er_shortcut_sum(maps, torch.ones(1, 3)))
print("as expected")
"""

WITHOUT_CUDA = """
import sys, torch
torch.version.cuda = torch.version.hip = None
import ernet_fast
from ernet_fast.er import operators
assert "triton" not in sys.modules
for name in NAMES:
    assert not (hasattr(torch.ops.ernet, name)
                and torch._C._dispatch_has_kernel_for_dispatch_key(f"ernet::{name}", "CUDA")), name
class OnCuda:
    device = torch.device("cuda")
assert not operators.supports_device(OnCuda())
print("as expected")
"""


def run(code: str, disabled: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ERNET_DISABLE_EXTENSION": str(int(disabled))}
    code = code.replace("DISABLED", str(disabled)).replace("NAMES", repr(NAMES))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "as expected", done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("disabled", [False, True])
def test_registered_with_a_cuda_build_of_torch(disabled):
    """Also without the compiled extension: then the schemas come from Python."""
    run(WITH_CUDA, disabled)


@pytest.mark.parametrize("disabled", [False, True])
def test_not_registered_without_cuda(disabled):
    run(WITHOUT_CUDA, disabled)


def test_a_cache_that_cannot_be_written_says_what_to_set(monkeypatch, tmp_path):
    """What Triton's cache raises during a launch, which is where kernels are compiled."""
    cache = pytest.importorskip("triton.runtime.cache")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="Not a directory.* set TRITON_CACHE_DIR to a folder that can be written"):
        with on_device_of(torch.ones(1)):
            cache.FileCacheManager("key")
