"""One call that prepares an ER network for inference: folded, in one dtype, without gradients, compiled or graphed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ernet_fast.er.shortcut import FoldedShortcut
from ernet_fast.models.cuda_graph import capture, check_on_cuda
from ernet_fast.models.folding import fold_for_inference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, compile: bool = False, cuda_graph: bool = False
) -> nn.Module:
    """A copy of an ER network that computes what `model` does in evaluation, as fast as this library can.

    `fold_for_inference` folds every BatchNorm, and with it each block's own scale a_{l,l}, into the convolution before
    it; a block's shortcuts, sum and ReLU are one pass, and so are those of the projection blocks. Then all parameters
    lose their gradients. With norm="group" the shortcuts still normalise each sample; the rest is folded.

    Args:
        model: a network, or part of one, that holds at least one `ERStage`, in evaluation mode; it is not modified.
        dtype: of the convolutions, the classifier and the images that the result takes; default: as they are. They
            are rounded once, after folding. Coefficients of the shortcuts stay float32 at least.
        compile: pass the result through `torch.compile`; with `cuda_graph` in its mode "reduce-overhead".
        cuda_graph: replay one CUDA graph for each shape of images, captured at its first call; the result is a new
            tensor each time. Not yet run on a GPU.

    Returns:
        The network, in evaluation mode, on the same device. For `torch.export` or `torch.jit.trace`, leave out
        `compile` and `cuda_graph`.

    Raises:
        TypeError: `model` is not a module, or `dtype` not a torch.dtype.
        ValueError: `model` is in training mode, holds no `ERStage`, was folded before, or has a BatchNorm that cannot
            be folded, for want of running statistics or of a convolution before it; the message names the module.
            `dtype` is not floating.
        RuntimeError: `cuda_graph` for a network that is not on a CUDA device.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    optimized = fold_for_inference(model if dtype is None else _widened(model, dtype))
    for name, module in optimized.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.endswith("shortcut.statistics"):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) cannot be folded: no plain nn.Conv2d stands before it. "
                "fold_for_inference leaves such a module as it is"
            )
    if cuda_graph:
        check_on_cuda("cuda_graph=True needs a network", optimized.parameters())
    if dtype is not None:
        _convert(optimized, dtype)
    optimized.requires_grad_(False)
    if compile:
        compiled: Any = torch.compile(optimized, mode="reduce-overhead" if cuda_graph else None)
        return compiled
    return CudaGraphs(optimized).eval() if cuda_graph else optimized


def _widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in the wider of `dtype`, float32 and the model's own, in which nothing but folding rounds."""
    if not isinstance(model, nn.Module):
        return model  # fold_for_inference says what is wrong
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    return copy.deepcopy(model).to(torch.promote_types(torch.promote_types(own, torch.float32), dtype))


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all but the coefficients of folded shortcuts, which operators take in the dtype of their sums."""
    kept = [(m, dict(m._buffers)) for m in model.modules() if isinstance(m, FoldedShortcut)]
    model.to(dtype)
    for module, buffers in kept:
        module._buffers.update(buffers)


class CudaGraphs(nn.Module):
    """A network whose calls replay a CUDA graph, one for each shape and layout of images; without gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._graphs: dict[Any, tuple[Any, Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the network; its graphs are captured anew."""
        return {**super().__getstate__(), "_graphs": {}}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The network's output for images x [N, C, H, W] on its CUDA device."""
        check_on_cuda("a captured network needs images x", [x])
        key = tuple(x.shape), x.stride(), x.dtype, x.device
        if key not in self._graphs:
            self._graphs[key] = self._capture(x)
        graph, images, output = self._graphs[key]
        images.copy_(x)
        graph.replay()
        return output.clone()

    def _capture(self, x: Tensor) -> tuple[Any, Tensor, Tensor]:
        images = x.clone()
        graph, output = capture(lambda: self.model(images), x.device)
        return graph, images, output
