"""Pictures of an evaluation: by magnification, with bands of confidence; calibration; the worst mistakes."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ernet_fast.console.tables import format_figure, format_interval
from ernet_fast.train import metrics
from ernet_fast.train.bootstrap import Bootstrap, intervals, roc_band
from ernet_fast.train.mistakes import Mistake
from ernet_fast.train.pictures import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    draw_confusion,
    draw_image,
    new_figure,
    roc_curves,
    save_figure,
    style_axes,
)  # fmt: skip
from ernet_fast.train.predictions import Predictions

_RATES = np.linspace(0, 1, 201)
_BAND_RESAMPLES = 500  # the band is drawn, not read off
_COLUMNS = 3


def _panels(count: int, width: float, height: float, columns: int = _COLUMNS) -> tuple[Any, list[Any]]:
    """A figure of `count` axes of that many inches each, row by row."""
    rows = math.ceil(count / columns)
    figure = new_figure(width * min(columns, count), height * rows)
    grid = figure.subplots(rows, min(columns, count), squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _parts(predictions: Predictions) -> dict[str, Predictions]:
    by_magnification = predictions.by_magnification()
    return {"all": predictions, **(by_magnification if len(by_magnification) > 1 else {})}


def confusion_panels(predictions: Predictions, path: str | os.PathLike[str] | None = None) -> bytes:
    """The confusion matrix of each magnification; PNG bytes, and a file if `path` is given."""
    parts = predictions.by_magnification()
    few = len(predictions.classes) <= 3
    figure, grid = _panels(len(parts), *((3.1, 2.7) if few else (6.4, 6.0)), columns=_COLUMNS if few else 2)
    for axes, (name, part) in zip(grid, parts.items(), strict=True):
        draw_confusion(axes, part, f"{name}, {len(part)} images")
    return save_figure(figure, path)


def roc_panels(predictions: Predictions, bootstrap: Bootstrap, path: str | os.PathLike[str] | None = None) -> bytes:
    """ROC curve of the second of two classes, or of more the mean of each against the rest, with its pointwise band, of
    all images and of each magnification.
    """
    parts = _parts(predictions)
    figure, grid = _panels(len(parts), 3.1, 2.9)
    drawn = Bootstrap(min(bootstrap.resamples, _BAND_RESAMPLES), bootstrap.level, bootstrap.seed)
    for axes, (name, part), color in zip(grid, parts.items(), (INK, *PALETTE), strict=False):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
        band = roc_band(part, drawn, _RATES)
        if band is not None:
            axes.fill_between(_RATES, *band, color=color, alpha=0.18, linewidth=0)
        for _, false_rate, true_rate, area in roc_curves(part)[:1]:
            axes.plot(false_rate, true_rate, color=color, linewidth=1.6)
            bounds = intervals(part, bootstrap)["auc"]
            text = f"AUC {format_figure(area)}\n{'no interval' if bounds is None else format_interval(bounds)}"
            axes.text(0.97, 0.06, text, ha="right", size=8, color=INK)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), title=f"{name}, {len(part)} images")
        axes.set(xlabel="1 - specificity", ylabel="sensitivity")
        style_axes(axes)
    return save_figure(figure, path)


def reliability_picture(predictions: Predictions, path: str | os.PathLike[str] | None = None) -> bytes:
    """Reliability diagram: accuracy by confidence in bins of equal width, and how many images are in each."""
    count, confidence, right = metrics.calibration_table(predictions).numpy().T
    figure = new_figure(4.4, 3.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.arange(metrics.BINS) / metrics.BINS
    there = count > 0
    width = 1 / metrics.BINS
    accuracy, mean = right[there] / count[there], confidence[there] / count[there]
    upper.bar(edges[there], accuracy, width, align="edge", color=PALETTE[0], edgecolor="white", linewidth=0.5)
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
    upper.scatter(mean, accuracy, s=12, color=PALETTE[1], zorder=3)
    error = metrics.compute_metrics(predictions)["ece"]
    upper.set(ylabel="accuracy", ylim=(0, 1.02), title=f"Calibration, ECE {format_figure(error)}")
    lower.bar(edges, count, width, align="edge", color=GRID, edgecolor="white", linewidth=0.5)
    lower.set(xlabel="confidence: probability of the predicted class", ylabel="images", xlim=(0, 1))
    for axes in (upper, lower):
        style_axes(axes)
    return save_figure(figure, path)


def mistakes_picture(
    mistakes: tuple[Mistake, ...], classes: tuple[str, ...], path: str | os.PathLike[str] | None = None
) -> bytes:
    """Each mistake beside its Grad-CAM map for the class that it was called."""
    figure, grid = _panels(2 * len(mistakes), 1.7, 2.0, columns=4)
    names = [name.replace("_", " ") for name in classes]
    for number, mistake in enumerate(mistakes):
        plain, mapped = grid[2 * number : 2 * number + 2]
        sample = mistake.sample
        draw_image(plain, mistake.image)
        draw_image(mapped, mistake.image)
        mapped.imshow(mistake.heat.numpy(), cmap="inferno", alpha=0.5, vmin=0, vmax=1)
        where = f"{sample.patient}, {sample.magnification}X" if sample.magnification else sample.patient
        plain.set_title(f"{where}\n{names[sample.label]}", size=7, color=INK)
        guess = f"{names[mistake.predicted]} {mistake.probabilities[mistake.predicted]:.0%}"
        mapped.set_title(f"called\n{guess}", size=7, color=INK)
    return save_figure(figure, path)
