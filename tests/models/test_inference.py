"""`optimize_for_inference` computes what the network did, in the dtype asked for, or says why it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ernet_fast import ERStage, er_resnet18, er_resnet50, optimize_for_inference
from ernet_fast.er.shortcut import FoldedShortcut
from ernet_fast.models import ERResNet
from ernet_fast.models.depths import FAMILY, LAYERS


def trained(model: ERResNet) -> ERResNet:
    """Statistics, scales and shifts far from their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and t.dim() < 3:
                noise = torch.randn(t.shape, generator=generator)
                t.copy_(noise.square() + 0.5 if name.endswith("running_var") else t + 0.3 * noise)
    return model.eval()


def network(depth: int = 18, **kw: Any) -> ERResNet:
    torch.manual_seed(0)
    return trained(ERResNet(FAMILY[depth], LAYERS[depth], 3, base_channels=4, **kw))


def images(dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format, n: int = 2) -> torch.Tensor:
    x = torch.randn((n, 3, 40, 56), generator=torch.Generator().manual_seed(2))
    return x.to(dtype).contiguous(memory_format=layout)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_same_outputs(depth: int, norm: str) -> None:
    """In float64, a few hundred operations deep, and in float32 as exact as the network itself."""
    model = network(depth, norm=norm, num_groups=2 if norm == "group" else None)
    exact = copy.deepcopy(model).double()
    x = images(torch.float64)
    expected = exact(x)
    optimized = optimize_for_inference(exact)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert relative(optimized(images(torch.float64, layout)), expected) < 1e-11
    assert not any(parameter.requires_grad for parameter in optimized.parameters()) and not optimized.training
    assert all(parameter.requires_grad for parameter in exact.parameters())
    single = [relative(net(x.float()), expected) for net in (optimize_for_inference(model), model)]
    assert single[0] <= 4 * single[1] + 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_other_dtypes(norm: str) -> None:
    """Rounded once, after folding: no less exact than a network that is rounded first."""
    model = network(50, norm=norm, num_groups=2 if norm == "group" else None)
    expected = copy.deepcopy(model).double()(images(torch.float64))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        optimized = optimize_for_inference(model, dtype)
        found = optimized(images(dtype))
        assert found.dtype == dtype
        rounded = relative(copy.deepcopy(model).to(dtype)(images(dtype)), expected)
        assert relative(found, expected) <= 2 * rounded + 64 * torch.finfo(dtype).eps
        folded = [module for module in optimized.modules() if isinstance(module, FoldedShortcut)]
        assert {module.a.dtype for module in folded} <= {torch.promote_types(torch.float32, dtype)}
        assert bool(folded) == (norm == "batch")
    with pytest.raises(TypeError, match=r"x is torch.float32 and the weights are torch.bfloat16"):
        optimize_for_inference(model, torch.bfloat16)(images(torch.float32))


def test_every_pass_over_maps() -> None:
    """With BatchNorms gone, each block is its convolutions, the ReLUs between them, and one weighted sum."""
    optimized, calls = optimize_for_inference(network(50)), []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Log():
        optimized(images(torch.float32))
    assert calls.count("ernet.weighted_sum.default") == 16
    assert calls.count("aten.convolution.default") == 1 + 16 * 3 + 4
    assert calls.count("aten.relu_.default") == 1 + 16 * 2
    assert not [name for name in calls if "norm" in name or "moments" in name or "aten.add." in name]


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole; of torch.compile's backends one that compiles no C++."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, mode: compiler(m, backend="aot_eager", fullgraph=True))
    torch.manual_seed(0)
    stage = ERStage(3, 8, 3, block="basic").eval()
    torch._dynamo.reset()
    compiled = optimize_for_inference(stage, compile=True)
    for n in (2, 3):
        x = images(torch.float32, n=n)
        assert relative(compiled(x), stage(x)) < 1e-5


def test_what_cannot_be_optimized() -> None:
    model = network()
    with pytest.raises(TypeError, match="dtype must be a torch.dtype or None, got 'half'"):
        optimize_for_inference(model, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*, got torch.int8"):
        optimize_for_inference(model, torch.int8)
    with pytest.raises(TypeError, match="got int"):
        optimize_for_inference(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the ERResNet is in training mode: call model\.eval\(\) first"):
        optimize_for_inference(network().train())
    with pytest.raises(ValueError, match="is folded already"):
        optimize_for_inference(optimize_for_inference(model))
    with pytest.raises(RuntimeError, match="cuda_graph=True needs a network on a CUDA device; it is on cpu"):
        optimize_for_inference(model, cuda_graph=True)
    model.layer2[1].bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"module 'layer2.1.bn1' has no running statistics"):
        optimize_for_inference(model)
    model = network()
    model.layer2[1].conv1 = nn.Sequential(model.layer2[1].conv1, nn.Identity()).eval()
    with pytest.raises(ValueError, match=r"module 'layer2.1.bn1' \(BatchNorm2d\) cannot be folded: no plain nn.Conv2d"):
        optimize_for_inference(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", [er_resnet18, er_resnet50])
def test_cuda_graph(build: Any) -> None:
    model = trained(build(3, base_channels=16)).cuda()
    graphed = optimize_for_inference(model, cuda_graph=True)
    for n in (1, 4, 1):
        x = images(torch.float32, n=n).cuda()
        first, second = graphed(x), graphed(x + 1)
        assert relative(first, model(x)) < 1e-3 and relative(second, model(x + 1)) < 1e-3
    assert relative(copy.deepcopy(graphed)(x), model(x)) < 1e-3
