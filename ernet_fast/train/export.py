"""The network of a checkpoint as a file for other runtimes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.data.augment import IMAGENET_MEAN, IMAGENET_STD, resized_size
from ernet_fast.models.export import FORMATS, export_network, load_exported
from ernet_fast.train.checkpoint import field_of, load_checkpoint, load_network
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.network import build_network
from ernet_fast.train.run_folder import find_checkpoint

_MOST = 1e-3
"""Largest relative difference of the exported program's logits."""
_MOST_RESIZED = 1e-2
"""The same of an ONNX program that resizes: about 1 value in 300 differs by one level of 255."""


class Exported(NamedTuple):
    """What `export_checkpoint` wrote."""

    file: Path
    checkpoint: Path
    epoch: int
    format: str
    classes: tuple[str, ...]  # of the logits, in order
    input: str  # dtype and shape of the images
    stain_target: str | None  # where not None, images are to be normalised to the checkpoint's stains first
    difference: float | None  # relative, of the logits, on batches of one and three; None if not run


class Preprocessing(nn.Module):
    """uint8 [N, 3, H, W] to a network's input, as `PatchTransform` without training: resize, central crop, scale.

    Args:
        image_size: H and W.
        size: pixels a side of the result.
        resize: as in `PatchTransform`.
        integers: resize uint8 images as PyTorch does, by its own fixed-point arithmetic; False for runtimes without it:
            in float32, columns before rows, rounded to integers in between and at the end, as PyTorch's result is.
    """

    def __init__(self, image_size: tuple[int, int], size: int, resize: str, *, integers: bool = True) -> None:
        super().__init__()
        self.integers = integers
        self.size, self.scaled = size, resized_size(image_size, (size, size), resize)
        self.resizes = self.scaled != image_size
        std, mean = torch.tensor(IMAGENET_STD), torch.tensor(IMAGENET_MEAN)
        self.factor: Tensor
        self.offset: Tensor
        self.register_buffer("factor", std.mul(255).reciprocal().view(3, 1, 1))
        self.register_buffer("offset", (mean / std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """float32 [N, 3, size, size]."""
        if self.resizes and not self.integers:
            height, width = self.scaled
            images = _rounded(F.interpolate(images.float(), (images.shape[2], width), mode="bilinear", antialias=True))
            images = _rounded(F.interpolate(images, (height, width), mode="bilinear", antialias=True))
        elif self.resizes:
            images = F.interpolate(images, self.scaled, mode="bilinear", antialias=True)
        top, left = ((side - self.size) // 2 for side in self.scaled)
        pixels = images[:, :, top : top + self.size, left : left + self.size].to(torch.float32)
        return torch.addcmul(-self.offset, pixels, self.factor)


def _rounded(x: Tensor) -> Tensor:
    return x.add(0.5).floor()


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    file: str | os.PathLike[str] | None = None,
    *,
    format: str,
    preprocessing: bool = False,
    input_size: tuple[int, int] | None = None,
) -> Exported:
    """Write the network of a checkpoint, see `models.export_network`, and run the file beside the network.

    Without `preprocessing` the images are float32 [N, 3, H, W] as `PatchTransform` gives them, of any size. With it
    they are uint8 [N, 3, H, W] of `input_size`, and resizing, cropping and scaling are part of the program. Stain
    normalisation never is: ONNX has no operators for it. `Exported.stain_target` says where images need it first.

    Args:
        checkpoint: a file of `fit`, or the folder of a run, which stands for its `best.pt`.
        file: where to write; default: beside the checkpoint, with the format's ending.
        format: "onnx", "pt2" or "torchscript".
        preprocessing: make it part of the program.
        input_size: height and width of the images; default: the training's image size. Only with `preprocessing`.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing or damaged, or an argument does not fit.
        ImportError: the packages of the extra "export" are missing, for ONNX.
        RuntimeError: the program's logits differ from the network's by more than 1e-3 of them (for an ONNX program that
            resizes, 1e-2).
    """
    if input_size is not None and not preprocessing:
        raise ValueError("input_size is of images that are resized in the program: only with preprocessing.")
    path = find_checkpoint(checkpoint)
    state = load_checkpoint(path)
    with field_of(path, "config"):
        config = TrainConfig.from_dict(state["config"] | {"weights": None})
    model = build_network(config, len(state["classes"]))
    load_network(model, state, path)
    size = (config.image_size, config.image_size) if input_size is None else input_size
    if min(size) < 1:
        raise ValueError(f"input_size={size}; expected two positive numbers.")
    if config.resize == "none" and min(size) < config.image_size:
        raise ValueError(f"input_size={size} is smaller than the training's {config.image_size} pixels, not resized.")
    example, described = _images((64, 64)) / 255.0, "float32 [N, 3, H, W], scaled as in training"
    most, program = _MOST, model.eval()
    if preprocessing:
        prepare = [Preprocessing(size, config.image_size, config.resize, integers=i) for i in (True, format != "onnx")]
        model, program = (nn.Sequential(part, model).eval() for part in prepare)
        most = _MOST_RESIZED if prepare[1].resizes and format == "onnx" else _MOST
        example, described = _images(size), f"uint8 [N, 3, {size[0]}, {size[1]}]"
    target = path.with_suffix(FORMATS.get(format, "")) if file is None else Path(file)
    if target.resolve() == path.resolve():
        raise ValueError(f"{target} is the checkpoint: name another file")
    with atomic_write(target) as stream:
        export_network(program, stream, example, format=format, dynamic_size=not preprocessing)
    stain = None if state["stain"] is None else str(state["stain"]["source"])
    difference = _difference(model, target, format, example, most)
    return Exported(target, path, state["epoch"], format, tuple(state["classes"]), described, stain, difference)


def _images(size: tuple[int, int]) -> Tensor:
    """Three images with structure of several pixels, as tissue has: uint8 [3, 3, H, W]."""
    coarse = torch.rand((3, 3, *(side // 8 + 2 for side in size)), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse * 255, size, mode="bilinear").to(torch.uint8)


@torch.no_grad()
def _difference(model: nn.Module, file: Path, format: str, images: Tensor, most: float) -> float | None:
    """Of the program's logits from the network's, relative to these; None where onnxruntime is missing."""
    try:
        program: Any = load_exported(file, format)
    except ImportError:
        return None
    worst = 0.0
    for count in (1, 3):
        expected, found = model(images[:count]), program(images[:count])
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    if not worst <= most:
        file.unlink()
        raise RuntimeError(
            f"{file} is not kept: the program's logits differ from the network's by {worst:.2g} of them."
        )
    return worst
