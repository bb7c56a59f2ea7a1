"""Loading of the compiled part: what it says of itself, the instruction sets, and life without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from ernet_fast import __version__, _backend, _library

needs_extension = pytest.mark.skipif(not _backend.extension_available(), reason=str(_backend.why_unavailable()))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@needs_extension
def test_build_info():
    info = _backend.build_info()
    assert info is not None
    assert info["version"] == __version__
    assert info["isa"] in info["isa_variants"] and "portable" in info["isa_variants"]
    assert isinstance(info["cuda_archs"], list)
    assert info["torch_abi_target"] == "2.11"
    assert info["compiler"] and info["torch_headers"]


CHECK_ISA = """
import torch, ernet_fast
from ernet_fast import _backend
from ernet_fast.reference import er_shortcut_sum
assert _backend.build_info() is not None, _backend.why_unavailable()
assert _backend.build_info()["isa"] == ISA, _backend.build_info()["isa"]
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        xs = [torch.randn(3, 37, 9, 11).to(dtype).contiguous(memory_format=layout).requires_grad_() for _ in range(8)]
        w = torch.randn(7, 37, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
        exact = [t.detach().double().requires_grad_() for t in (*xs, w)]
        y, e = ernet_fast.er_shortcut_sum(xs, w, relu=True), er_shortcut_sum(exact[:-1], exact[-1], relu=True)
        y.backward(torch.ones_like(y)); e.backward(torch.ones_like(e))
        bound = 8 * torch.finfo(dtype).eps * (1 if dtype in (torch.bfloat16, torch.float16) else 3 * 9 * 11) ** 0.5
        for a, b in [(y, e), *((t.grad, x.grad) for t, x in zip((*xs, w), exact))]:
            error = float((a.double() - b).norm() / b.norm())
            assert error <= bound, (dtype, layout, error, bound)
print("checked")
"""


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vbmi"])
def test_every_instruction_set_agrees_with_the_reference(isa):
    result = run(CHECK_ISA.replace("ISA,", f"{isa!r},", 1), ERNET_ISA=isa)
    if "this CPU or this build does not have it" in result.stderr:
        pytest.skip(f"{isa} is not available on this machine")
    assert result.stdout.strip() == "checked", result.stderr


@needs_extension
def test_unknown_instruction_set_says_what_is_expected():
    done = run("import ernet_fast", ERNET_ISA="sse9")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error == "ValueError: environment variable ERNET_ISA=sse9; expected portable, avx2, avx512 or avx512vbmi."


def test_without_the_extension_everything_works_with_one_warning():
    code = """
import warnings
warnings.simplefilter("always")
import torch, ernet_fast
from ernet_fast.models import ERStage
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    xs = [torch.randn(2, 3, 5, 5, requires_grad=True) for _ in range(3)]
    for _ in range(3):
        y = ernet_fast.er_shortcut_sum(xs, torch.ones(2, 3))
    assert torch.equal(y, ernet_fast.reference.er_shortcut_sum(xs, torch.ones(2, 3)))
    y.sum().backward()
    ERStage(3, 8, 3, block="basic")(xs[0]).sum().backward()
    image = (torch.rand(3, 32, 32) * 200).byte()
    ernet_fast.stain.macenko_fit(image)
fallback = [w for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(fallback) == 1, [str(w.message) for w in caught]
assert "reference implementation" in str(fallback[0].message)
assert "ERNET_DISABLE_EXTENSION" in str(fallback[0].message)
print("worked")
"""
    result = run(code, ERNET_DISABLE_EXTENSION="1")
    assert result.stdout.strip() == "worked", result.stderr


def test_import_needs_only_torch_and_numpy():
    """None of the optional packages is imported, and none is missed, by `import ernet_fast` and its compute parts."""
    code = """
import sys
blocked = ["PIL", "sklearn", "matplotlib", "torchmetrics", "lightning_fabric", "kornia", "rich", "torchvision", "timm",
           "torchstain", "safetensors", "scipy", "cv2"]
for name in blocked:
    sys.modules[name] = None
import torch, ernet_fast, ernet_fast.data, ernet_fast.stain, ernet_fast.models, ernet_fast.reference, ernet_fast.cli
ernet_fast.er_resnet18(num_classes=2).eval()(torch.zeros(1, 3, 32, 32))
print("imported")
"""
    result = run(code)
    assert result.stdout.strip() == "imported", result.stderr


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm of binutils is not installed")
def test_binary_uses_the_stable_abi_alone_and_nothing_of_python():
    """No C++ symbol of torch is imported: those change between versions, the C shims do not."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(_library.PATH)], capture_output=True, text=True, check=True
    ).stdout.split()
    shims = [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
    assert shims
    unstable = [
        s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10", "_ZNK5torch"))
    ]
    assert not unstable
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]  # one binary for every version of Python


@needs_extension
def test_a_compiled_part_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(_backend, "OPERATORS", {**_backend.OPERATORS, "of_tomorrow": ""})
    module, reason = _backend._load.__wrapped__()
    assert module is None
    assert "another version" in reason and "lacks of_tomorrow." in reason and "pip install" in reason


@needs_extension
def test_a_library_that_lacks_a_function_is_not_used(monkeypatch):
    monkeypatch.setattr(_library, "FUNCTIONS", (*_library.FUNCTIONS, "of_tomorrow"))
    library, reason = _backend._load.__wrapped__()
    assert library is None
    assert "another version" in reason and "ernet_of_tomorrow" in reason and "pip install" in reason


@needs_extension
def test_every_operator_is_named_once():
    import torch

    from ernet_fast.stain import deprecated_operators

    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ernet::")}
    registered -= {f"ernet::{name}" for name in deprecated_operators.NAMES}
    registered -= {f"ernet::{name}" for name in _backend.TRITON_OPERATORS}  # defined once a CUDA path is imported
    assert {f"ernet::{name}" for name in _backend.OPERATORS} == registered
