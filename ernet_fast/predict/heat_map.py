"""Pictures of a slide's prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernet_fast._optional import require
from ernet_fast.predict.slide import SlidePrediction

_OPACITY = 0.45
_COLOURS = "inferno"


def shown_class(found: SlidePrediction, wanted: str | None = None) -> int:
    """Index of the class that maps show: `wanted`; of two the second; else the most probable on average.

    Raises ValueError for a class that there is not.
    """
    if wanted is not None:
        if wanted not in found.classes:
            raise ValueError(f"class {wanted!r}; the network knows {', '.join(found.classes)}.")
        return found.classes.index(wanted)
    mean = found.mean()
    return 1 if len(found.classes) == 2 else 0 if mean is None else int(mean.argmax())


def heat_map(found: SlidePrediction, index: int) -> NDArray[np.uint8]:
    """The probability of class `index` in colours, uint8 [h, w, 4] of the thumbnail's size; transparent without it."""
    matplotlib = require("matplotlib", extra="train", purpose="drawing heat maps")
    values = found.probabilities[..., index]
    colours = (matplotlib.colormaps[_COLOURS](np.nan_to_num(values)) * 255).round().astype(np.uint8)
    colours[~found.looked_at] = (255, 255, 255, 0)
    k, (height, width) = found.cell_pixels, found.thumbnail.shape[:2]
    return colours.repeat(k, axis=0).repeat(k, axis=1)[:height, :width]


def overlay(found: SlidePrediction, index: int) -> NDArray[np.uint8]:
    """The thumbnail, uint8 [h, w, 3], with the heat map laid over it where the network looked."""
    colours = heat_map(found, index)
    share = _OPACITY * (colours[..., 3:] > 0)
    return (found.thumbnail * (1 - share) + colours[..., :3] * share).round().astype(np.uint8)


def save_overlay(found: SlidePrediction, index: int, file: Any) -> None:
    """Write the overlay as PNG into an open file, with a scale of millimetres and of probabilities."""
    matplotlib = require("matplotlib", extra="train", purpose="drawing heat maps")
    figure_module = require("matplotlib.figure", extra="train", purpose="drawing heat maps")
    require("matplotlib.backends.backend_agg", extra="train", purpose="drawing heat maps")
    height, width = found.thumbnail.shape[:2]
    side = found.settings["field_um"] * (1 - found.settings["overlap"]) / found.cell_pixels / 1000
    scale = 8 / max(height, width)
    figure = figure_module.Figure(figsize=(width * scale + 1.6, height * scale + 0.9), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.imshow(overlay(found, index), extent=(0, width * side, height * side, 0), interpolation="nearest")
    axes.set(xlabel="mm", ylabel="mm")
    axes.set_title(found.slide.name, size=9)
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), _COLOURS)
    figure.colorbar(colours, ax=axes, label=f"probability of {found.classes[index]}", shrink=0.8)
    figure.savefig(file, format="png")
