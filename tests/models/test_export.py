"""Deployment of ER-ResNets: TorchScript, ONNX, torch.export and pickling."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from ernet_fast import er_resnet18, fold_for_inference
from ernet_fast.models import ERResNet

VARIANTS = ("fused", "unfused", "group", "folded")


def network(variant: str) -> nn.Module:
    torch.manual_seed(0)
    norm = {"norm": "group", "num_groups": 4} if variant == "group" else {}
    model = er_resnet18(3, base_channels=8, fused=variant != "unfused", **norm)
    model(torch.randn(4, 3, 64, 64))  # running statistics of something
    model.eval()
    return fold_for_inference(model) if variant == "folded" else model


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
def test_trace(variant: str, grad: bool) -> None:
    """A traced network computes the same for other images and batches, also after a round trip through a file."""
    model = network(variant)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, images())
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for x in (images(), images(3) + 1):
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_script_says_what_to_use(variant: str) -> None:
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile an ER-ResNet: use torch\.jit\.trace"):
        torch.jit.script(network(variant))
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile an ER-ResNet"):
        torch.jit.script(nn.Sequential(network(variant), nn.Softmax(1)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(variant: str, dynamo: bool) -> None:
    """ONNX's reference implementation of the exported graph computes what the network does."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    if dynamo:
        pytest.importorskip("onnxscript", reason="needs onnxscript")
    model, file = network(variant), io.BytesIO()
    with torch.no_grad():
        expected = model(images())
        if dynamo:
            torch.onnx.export(model, (images(),), dynamo=True, input_names=["images"]).save(file)
        else:
            torch.onnx.export(model, (images(),), file, dynamo=False, input_names=["images"])
    exported = onnx.load_model_from_string(file.getvalue())
    onnx.checker.check_model(exported)
    (found,) = onnx.reference.ReferenceEvaluator(exported).run(None, {"images": images().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export(variant: str) -> None:
    model = network(variant)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    for n in (1, 2, 5):
        torch.testing.assert_close(program.module()(images(n)), model(images(n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies(variant: str) -> None:
    model = network(variant)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    ):  # fmt: skip
        assert isinstance(copied, ERResNet)
        assert torch.equal(copied(images()), model(images()))
