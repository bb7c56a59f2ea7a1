"""Deployment of ER-ResNets: TorchScript, ONNX, torch.export and pickling."""

from __future__ import annotations

import copy
import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ernet_fast import ERStage, fold_for_inference
from ernet_fast.models import ERResNet, export_network, load_exported

VARIANTS = ("fused", "unfused", "group", "folded")


def network(variant: str) -> nn.Module:
    torch.manual_seed(0)
    norm = {"norm": "group", "num_groups": 4} if variant == "group" else {}
    model = ERResNet("basic", (1, 3, 1, 1), 3, base_channels=8, fused=variant != "unfused", **norm)
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


SHAPES = ((1, 3, 64, 64), (3, 3, 96, 70), (2, 3, 33, 40))


def assert_same(program: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    """On batches of one, two and three, and on other sizes than that of the example."""
    with torch.no_grad():
        for shape in SHAPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def operators(file: Path, format: str) -> str:
    """The program as text, its operators with their namespaces."""
    if format == "pt2":
        calls = [node.target for node in torch.export.load(file).graph.nodes if node.op == "call_function"]
        return " ".join(call.name() for call in calls if isinstance(call, torch._ops.OpOverload))
    if format == "torchscript":
        return str(torch.jit.load(file).inlined_graph)
    nodes = importlib.import_module("onnx").load(file).graph.node
    return " ".join(f"{node.domain}::{node.op_type}" for node in nodes)


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx(variant: str, tmp_path: Path) -> None:
    """A network exported by torch itself, as it is, runs in onnxruntime for any batch and size."""
    needs_onnx()
    model, axes = network(variant), {0: "n", 2: "h", 3: "w"}
    torch.onnx.export(
        model, (images(),), tmp_path / "er.onnx", dynamo=False, input_names=["images"], dynamic_axes={"images": axes}
    )
    assert_same(load_exported(tmp_path / "er.onnx", "onnx"), model)


def test_onnx_by_the_newer_exporter(tmp_path: Path) -> None:
    """The fused network as it is: its weighted sums are ONNX's standard operators."""
    needs_onnx()
    model, dim, file = network("fused"), torch.export.Dim, tmp_path / "er.onnx"
    dims = {0: dim("n", min=1, max=64), 2: dim("h", min=33, max=512), 3: dim("w", min=33, max=512)}
    program = torch.onnx.export(
        model, (images(),), dynamo=True, input_names=["images"], dynamic_shapes=(dims,), verbose=False
    )
    assert program is not None
    program.save(file)
    assert_same(load_exported(file, "onnx"), model)
    assert {node.partition("::")[0] for node in operators(file, "onnx").split()} == {""}


@pytest.mark.parametrize("variant", VARIANTS)
def test_export(variant: str) -> None:
    model, dim = network(variant), torch.export.Dim
    dims = {0: dim("n", max=64), 2: dim("h", min=33, max=512), 3: dim("w", min=33, max=512)}
    assert_same(torch.export.export(model, (images(),), dynamic_shapes=(dims,)).module(), model)


@pytest.mark.parametrize(("format", "variant"), [
    ("onnx", "fused"), ("onnx", "group"), ("pt2", "folded"), ("torchscript", "fused"), ("torchscript", "folded"),
])  # fmt: skip
def test_export_network(format: str, variant: str, tmp_path: Path) -> None:
    """The file holds standard operators alone and runs on two batch sizes; the network stays as it was."""
    if format == "onnx":
        needs_onnx()
    model, file = network(variant), tmp_path / "network"
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}
    export_network(model, file, images(), format=format)
    assert_same(load_exported(file, format), model)
    assert "ernet::" not in operators(file, format)
    assert model.fused and model.layer1.fused
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name][0]) and tensor.requires_grad == before[name][1]


def test_export_network_by_the_older_exporter(tmp_path: Path) -> None:
    needs_onnx()
    model = network("fused")
    with open(tmp_path / "er.onnx", "wb") as file:
        export_network(model, file, images(), format="onnx", dynamo=False, dynamic_size=False)
    program = load_exported(tmp_path / "er.onnx", "onnx")
    for n in (1, 3):
        torch.testing.assert_close(program(images(n)), model(images(n)).detach(), rtol=1e-4, atol=1e-5)


def test_what_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = network("fused"), tmp_path / "er"
    with pytest.raises(ValueError, match="format must be one of onnx, pt2, torchscript, got 'tflite'"):
        export_network(model, file, images(), format="tflite")
    with pytest.raises(ValueError, match=r"an example of at least 2, \[N, C, H, W\], got \[1, 3, 64, 64\]"):
        export_network(model, file, images(1), format="pt2")
    with pytest.raises(ValueError, match=r"33 pixels a side at least for a program of any size, got \[2, 3, 32, 64\]"):
        export_network(model, file, images()[:, :, :32], format="pt2")
    with pytest.raises(ValueError, match="in training mode"):
        export_network(network("fused").train(), file, images(), format="pt2")
    with pytest.raises(TypeError, match="got int"):
        export_network(3, file, images(), format="pt2")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"onnx is needed for export to ONNX.*ernet_fast\[export\]"):
        export_network(model, file, images(), format="onnx")
    assert not file.exists()


def compiled_ahead(program: torch.export.ExportedProgram, file: Path) -> Callable[[Tensor], Tensor]:
    """The program as a shared library; of its wrapper little is optimised, which compiles in a fraction of the time."""
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(file), inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"}
    )
    return torch._inductor.aoti_load_package(package)


ONCE_MORE = pytest.mark.skipif("ERNET_TEST_AOTI" not in os.environ, reason="set ERNET_TEST_AOTI: it compiles once more")


@pytest.mark.parametrize("exported", ["by torch", pytest.param("by export_network", marks=ONCE_MORE)])
def test_ahead_of_time_inductor(exported: str, tmp_path: Path) -> None:
    """With this library's operators, and with standard ones, on two batch sizes."""
    torch.manual_seed(0)
    stage = fold_for_inference(ERStage(3, 8, 2, block="basic").eval()).requires_grad_(False)
    x = torch.randn(2, 3, 36, 36)
    if exported == "by torch":
        program = torch.export.export(stage, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    else:
        export_network(stage, tmp_path / "stage.exported.pt2", x, format="pt2", dynamic_size=False)
        program = torch.export.load(tmp_path / "stage.exported.pt2")
    compiled = compiled_ahead(program, tmp_path / "stage.pt2")
    for n in (1, 3):
        x = torch.randn(n, 3, 36, 36)
        torch.testing.assert_close(compiled(x), stage(x), rtol=1e-4, atol=1e-5)


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
