"""ER networks as files for other runtimes: ONNX, torch.export, TorchScript."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor, nn

from ernet_fast._optional import require
from ernet_fast.er.shortcut import FoldedShortcut
from ernet_fast.models.folding import fold_for_inference
from ernet_fast.models.resnet import ERResNet
from ernet_fast.models.stage import ERStage

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".torchscript.pt"}
"""Formats and the usual ends of their files' names."""
_LARGEST = 65536
_SMALLEST = 33  # pixels a side: below, the last map of five halvings is one pixel


def export_network(
    model: nn.Module,
    file: str | os.PathLike[str] | IO[bytes],
    images: Tensor,
    *,
    format: str,
    dynamic_size: bool = True,
    dynamo: bool = True,
) -> None:
    """Write an ER network, folded (`fold_for_inference`), as a program of PyTorch's or ONNX's standard operators.

    The file needs no part of this library. It takes any number of images, and of any size unless `dynamic_size` is
    False. ONNX: input "images", output "logits". `load_exported` runs all formats.

    Args:
        model: a network, or an `nn.Sequential` or other module around one, in evaluation mode; not modified.
        file: path, or a binary file.
        images: an example of at least 2 images, such as [2, C, 224, 224], on the model's device.
        format: "onnx", "pt2" (`torch.export`; input of AOTInductor) or "torchscript" (a trace).
        dynamic_size: let height and width differ from those of `images`, from 33 pixels on.
        dynamo: for "onnx", use the exporter on `torch.export`; False takes the one on TorchScript.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown format, fewer than 2 images, or `model` is in training mode, holds no `ERStage`, or a
            BatchNorm without running statistics.
        ImportError: "onnx" without the packages onnx and onnxscript.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if images.dim() != 4 or images.shape[0] < 2:
        raise ValueError(f"images must be an example of at least 2, [N, C, H, W], got {list(images.shape)}")
    if dynamic_size and min(images.shape[2:]) < _SMALLEST:
        raise ValueError(
            f"images must have {_SMALLEST} pixels a side at least for a program of any size, got {list(images.shape)}; "
            "or dynamic_size=False"
        )
    if format == "onnx":
        for package in ("onnx", "onnxscript") if dynamo else ("onnx",):
            require(package, extra="export", purpose="export to ONNX")
    program, shapes = _of_standard_operators(model), _shapes(dynamic_size)
    with torch.no_grad(), warnings.catch_warnings():
        # torch.jit is to be replaced by torch.export, sizes become constants, and torch uses what it deprecates itself
        for category in (DeprecationWarning, torch.jit.TracerWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        if format == "torchscript":
            torch.jit.save(torch.jit.trace(program, images, check_trace=False), file)
        elif format == "pt2":
            torch.export.save(torch.export.export(program, (images,), dynamic_shapes=shapes), file)
        elif dynamo:
            exported: Any = torch.onnx.export(program, (images,), dynamo=True, dynamic_shapes=shapes, **_ONNX)
            exported.save(file)
        else:
            axes = {axis: dim.__name__ for axis, dim in shapes[0].items()}
            names = {"images": axes, "logits": {0: axes[0]}}
            torch.onnx.export(program, (images,), file, dynamo=False, dynamic_axes=names, **_ONNX)  # type: ignore[arg-type]


_ONNX: Any = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}


def _shapes(dynamic_size: bool) -> tuple[dict[int, Any]]:
    batch = torch.export.Dim("n", min=1, max=_LARGEST)
    height, width = (torch.export.Dim(name, min=_SMALLEST, max=_LARGEST) for name in ("height", "width"))
    return ({0: batch, 2: height, 3: width} if dynamic_size else {0: batch},)


def _of_standard_operators(model: nn.Module) -> nn.Module:
    """A folded copy that computes every stage by PyTorch's own operators."""
    folded = isinstance(model, nn.Module) and any(isinstance(module, FoldedShortcut) for module in model.modules())
    program = copy.deepcopy(model) if folded else fold_for_inference(model)
    for module in program.modules():
        if isinstance(module, (ERStage, ERResNet)):
            module.fused = False
    return program.requires_grad_(False)


def load_exported(path: str | os.PathLike[str], format: str) -> Callable[[Tensor], Tensor]:
    """The program of a file of `export_network`, as a function of images on the CPU; ONNX runs in onnxruntime."""
    if format == "torchscript":
        return torch.jit.load(path, map_location="cpu")
    if format == "pt2":
        return torch.export.load(path).module()
    session = require("onnxruntime", extra="export", purpose="running ONNX files").InferenceSession(os.fspath(path))
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
