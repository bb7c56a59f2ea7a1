"""A sheet that shows what the augmentation of a run does to an image."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from ernet_fast.data.augment import resized
from ernet_fast.data.batch_augment import DRAWS, AugmentRanges, augment_batch
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.pictures import INK, new_figure, save_figure
from ernet_fast.train.training_input import draws_of, ranges_of, stain_changed

_NOTHING = AugmentRanges(flips=False, quarter_turns=False, rotation=0.0, translation=0.0, zoom=(1.0, 1.0), crop=1.0)
_INCH = 1.3  # of a picture


def single_kinds(config: TrainConfig) -> dict[str, AugmentRanges]:
    """Each kind of change that the settings ask for by itself, named with its range, and all of them together."""
    ranges = ranges_of(config)
    titles = {
        "flips": "flips",
        "quarter_turns": "quarter turns",
        "rotation": f"rotation\n±{ranges.rotation:g}°",
        "translation": f"translation\n±{ranges.translation:.0%}",
        "zoom": f"zoom\n{ranges.zoom[0]:g} to {ranges.zoom[1]:g}",
        "crop": f"crop\n{ranges.crop:.0%} or more",
    }
    shown = {}
    for name, title in titles.items():
        value = getattr(ranges, name)
        if value != getattr(_NOTHING, name):
            shown[title] = replace(_NOTHING, **{name: value})
    return shown | {"all together": ranges}


def augmentation_sheet(
    image: Tensor, config: TrainConfig, path: str | os.PathLike[str] | None = None, *, columns: int = 6
) -> bytes:
    """PNG of an image uint8 [3, H, W] as it is and, a row for each kind of change, as training would change it.

    Written to `path` if one is given. The images are those of `columns` draws of the settings' seed.
    """
    size = (config.image_size, config.image_size)
    image = resized(image, size, config.resize)
    top, left = (int(side - own) // 2 for side, own in zip(image.shape[1:], size, strict=True))
    batch = image[None, :, top : top + size[0], left : left + size[1]].expand(columns, -1, -1, -1)
    draws = draws_of(config.seed, 1, range(columns), DRAWS + 4)
    rows: dict[str, Tensor] = {"image": batch[:1]}
    stained = config.stain_gain or config.stain_shift
    for title, ranges in single_kinds(config).items():
        pixels = batch
        if title == "all together" and stained:
            pixels = stain_changed(batch, draws[:, DRAWS:], config.stain_gain, config.stain_shift)
            rows[f"stains\n×(1±{config.stain_gain:g}) ±{config.stain_shift:g}"] = pixels
        rows[title] = augment_batch(pixels, draws[:, :DRAWS], ranges)
    figure = new_figure(_INCH * (columns + 1), _INCH * len(rows))
    for row, (title, images) in enumerate(rows.items()):
        for column in range(columns):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            axes.set_axis_off()
            if column < len(images):
                axes.imshow(images[column].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
            if column == 0:
                axes.text(-0.08, 0.5, title, transform=axes.transAxes, ha="right", va="center", fontsize=7, color=INK)
    return save_figure(figure, path)
