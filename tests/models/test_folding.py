"""Networks folded for inference compute what they were folded from, and keep to it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ernet_fast import ERStage, fold_for_inference
from ernet_fast.er.shortcut import FoldedShortcut
from ernet_fast.models import ERResNet

LAYERS = (2, 3, 1, 2)


def network(family: str = "bottleneck", **kw: object) -> ERResNet:
    """A network in evaluation with statistics, weights and biases far from their initial values."""
    torch.manual_seed(3)
    model = ERResNet(family, LAYERS, 4, base_channels=4, **kw)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and t.dim() < 3:
                noise = torch.randn(t.shape, generator=generator)
                t.copy_(noise.square() + 0.5 if name.endswith("running_var") else t + 0.3 * noise)
    return model.eval()


def images(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    x = torch.randn((2, 3, 40, 56), generator=torch.Generator().manual_seed(2))
    return x.to(dtype).contiguous(memory_format=layout)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("family", "kw"), [
    ("basic", {}),
    ("bottleneck", {}),
    ("bottleneck", {"block": "er133"}),
    ("bottleneck", {"norm": "group", "num_groups": 2}),
    ("bottleneck", {"replace_stride_with_dilation": (False, True, True)}),
])  # fmt: skip
def test_same_outputs(family, kw, fused, layout):
    """In float64: a few hundred operations deep, each rounding to 1e-16."""
    model = network(family, **kw).double()
    model.set_fused(fused)
    x = images(torch.float64, layout)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    folded = fold_for_inference(model)
    assert relative(folded(x), expected) < 1e-12
    assert relative(folded.forward_features(x), model.forward_features(x)) < 1e-12
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_unfolded(dtype):
    exact = network().double()(images(torch.float64))
    model = network().to(dtype)
    ours, unfolded = (relative(m(images(dtype)).detach(), exact) for m in (fold_for_inference(model), model))
    assert ours <= 2 * unfolded + 8 * torch.finfo(dtype).eps


def test_autocast_and_gradients_of_images():
    model, folded = network(), fold_for_inference(network())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(folded(images()), model(images())) < 32 * torch.finfo(torch.bfloat16).eps
    gradients = []
    model = model.double()
    for net in (model, fold_for_inference(model)):
        x = images(torch.float64).requires_grad_()
        net(x)[:, 1].sum().backward()
        gradients.append(x.grad)
    assert relative(gradients[1], gradients[0]) < 1e-11


def test_the_copy_does_not_follow_the_model():
    """Training goes on after folding: the copy stays as it is, and folding again gives the new network."""
    model = network().double()
    folded, x = fold_for_inference(model), images(torch.float64)
    before = folded(x)
    model.train()
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()
    assert torch.equal(folded(x), before)
    assert relative(model(x), before) > 1e-3
    assert relative(fold_for_inference(model)(x), model(x)) < 1e-12
    assert torch.equal(folded.train()(x), before)  # nothing of it is left to train on batches
    assert torch.equal(folded.train(False)(x), before)


def test_empty_batch_single_pixels_and_a_stage_alone():
    torch.manual_seed(0)
    stage = ERStage(5, 8, 4).double().eval()
    folded = fold_for_inference(stage)
    assert isinstance(folded, ERStage)
    for shape in ((0, 5, 4, 4), (1, 5, 1, 1), (3, 5, 2, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(folded(x), stage(x), rtol=1e-12, atol=1e-12)


def test_state_dict_copies_and_pickles():
    folded, x = fold_for_inference(network()), images()
    expected = folded(x)
    state = folded.state_dict()
    assert {"layer1.1.conv3.weight", "layer1.1.conv3.bias", "layer1.1.shortcut.a", "layer1.1.shortcut.b"} <= set(state)
    assert not any("running" in name or ".bn" in name for name in state)
    other = fold_for_inference(ERResNet("bottleneck", LAYERS, 4, base_channels=4).eval())
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        network().load_state_dict(state)
    assert torch.equal(copy.deepcopy(folded)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), expected)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.slow
def test_export_and_compile():
    folded, x = fold_for_inference(network("basic")), images()
    expected = folded(x)
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "ernet.weighted_sum.default" in names
    assert not {name for name in names if "batch_norm" in name or "moments" in name or "rsqrt" in name}
    torch._dynamo.reset()
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_named():
    with pytest.raises(TypeError, match="got int"):
        fold_for_inference(3)
    with pytest.raises(ValueError, match="the Linear holds no ERStage"):
        fold_for_inference(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match=r"the ERResNet is in training mode: call model\.eval\(\) first"):
        fold_for_inference(network().train())
    model = network()
    model.layer2[1].bn2.train()
    with pytest.raises(ValueError, match=r"module 'layer2.1.bn2' is in training mode"):
        fold_for_inference(model)
    model = network()
    model.layer2[1].bn2 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"module 'layer2.1.bn2' has no running statistics"):
        fold_for_inference(model)
    with pytest.raises(ValueError, match=r"module 'layer1.1.shortcut' is folded already"):
        fold_for_inference(fold_for_inference(network()))
    with pytest.raises(ValueError, match="no constants"):
        FoldedShortcut(network(norm="group", num_groups=2).layer1[1].shortcut)


def test_other_layers_stay():
    """A normalisation that is no BatchNorm, or a convolution of another class, runs as it is."""

    class Convolution(nn.Conv2d):
        pass

    model = network().double()
    model.layer2[1].bn3 = nn.GroupNorm(2, 32).double()
    model.layer2[2].conv1 = Convolution(32, 8, 1, bias=False).double()
    model.eval()
    folded, x = fold_for_inference(model), images(torch.float64)
    assert isinstance(folded.layer2[1].bn3, nn.GroupNorm) and isinstance(folded.layer2[2].bn1, nn.BatchNorm2d)
    assert relative(folded(x), model(x)) < 1e-12


def test_converted_to_synchronised_batch_norm():
    model = network().double()
    x = images(torch.float64)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    folded = fold_for_inference(converted)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in folded.modules())
    assert relative(folded(x), model(x)) < 1e-12
