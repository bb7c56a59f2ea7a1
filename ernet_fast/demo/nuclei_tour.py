"""Nuclei of some images, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from ernet_fast._optional import require
from ernet_fast.data import LABELS, Sample, read_image
from ernet_fast.data.pixel_size import breakhis_mpp
from ernet_fast.segment import draw_outlines, nuclei
from ernet_fast.train.images import evenly_chosen

_MOST = 12
"""Images that are measured: a few seconds."""

FIGURES = ("density_per_mm2", "area_mean_um2", "eccentricity_mean")


@dataclass(frozen=True)
class NucleiTour:
    """Figures of each class, [images, nuclei, means of `FIGURES`], pictures with outlines, or why there are none."""

    rows: dict[str, tuple[int, int, tuple[float | None, ...]]]
    pictures: tuple[tuple[bytes, str, str], ...]
    reason: str = ""


def show_nuclei(samples: Sequence[Sample]) -> NucleiTour:
    """Find the nuclei of a few images, evenly chosen; without scikit-image, say so."""
    try:
        require("skimage.segmentation", extra="segment", purpose="finding nuclei")
    except ImportError as error:
        return NucleiTour({}, (), str(error))
    pil = require("PIL.Image", extra="train", purpose="pictures")
    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in LABELS}
    pictures = []
    for sample in evenly_chosen(samples, _MOST):
        image, name = read_image(sample.path), LABELS[sample.malignant]
        result = nuclei(image, mpp=breakhis_mpp(sample.magnification, image.shape[1]))
        if not found[name]:
            file = BytesIO()
            pil.fromarray(draw_outlines(image, result)).save(file, format="PNG")
            caption = f"{name}, {sample.magnification}X: {result.count} nuclei"
            pictures.append((file.getvalue(), f"Outlines of nuclei, {caption}", caption))
        found[name].append(result.figures())
    rows = {name: _row(figures) for name, figures in found.items() if figures}
    return NucleiTour(rows, tuple(pictures))


def _row(figures: list[dict[str, float | None]]) -> tuple[int, int, tuple[float | None, ...]]:
    means = []
    for key in FIGURES:
        values = [value for entry in figures if (value := entry[key]) is not None]
        means.append(float(np.mean(values)) if values else None)
    return len(figures), int(sum(entry["nuclei"] or 0 for entry in figures)), tuple(means)
