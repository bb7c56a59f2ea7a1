"""Pictures of a run, drawn by matplotlib without a display."""

from __future__ import annotations

import os
from io import BytesIO
from itertools import cycle, product
from typing import Any

import numpy as np
from torch import Tensor

from ernet_fast._optional import require
from ernet_fast.console.atomic_file import atomic_write
from ernet_fast.console.tables import format_figure
from ernet_fast.train.metrics import area_under_curve, confusion_matrix
from ernet_fast.train.predictions import Predictions

INK, MUTED, GRID = "#1f2933", "#5f6c7b", "#e4e7eb"
PALETTE = ("#2563a8", "#c2571a", "#2f855a", "#7c4dbb", "#b83280", "#718096", "#b7791f", "#0f8a8a")
_DPI = 144


def new_figure(width: float, height: float) -> Any:
    """An empty figure of `width` x `height` inches, in one style for all; matplotlib's global state stays as it is."""
    require("matplotlib", extra="train", purpose="drawing pictures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any, *, grid: bool = True) -> None:
    """Thin, grey and out of the way."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, labelcolor=INK)
    for text, size in ((axes.xaxis.label, 9), (axes.yaxis.label, 9), (axes.title, 10)):
        text.set(color=INK, size=size)
    if grid:
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def save_figure(figure: Any, path: str | os.PathLike[str] | None) -> bytes:
    """The figure as a PNG file, written atomically if `path` is given."""
    target = BytesIO()
    figure.savefig(target, format="png", dpi=_DPI)
    if path is not None:
        with atomic_write(path) as file:
            file.write(target.getvalue())
    return target.getvalue()


def confusion_picture(predictions: Predictions, path: str | os.PathLike[str] | None = None) -> bytes:
    """Confusion matrix, counts and row shares; PNG bytes, and a file if `path` is given."""
    figure = new_figure(*((4.4, 3.6) if len(predictions.classes) <= 3 else (6.9, 6.4)))
    draw_confusion(figure.subplots(), predictions, "Confusion matrix")
    return save_figure(figure, path)


def draw_confusion(axes: Any, predictions: Predictions, title: str) -> None:
    """The confusion matrix, counts and row shares, on `axes`."""
    counts = confusion_matrix(predictions)
    classes = len(predictions.classes)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, column in product(range(classes), repeat=2):
        share = float(shares[row, column])
        style: dict[str, Any] = {"ha": "center", "va": "center", "size": 11 if classes <= 3 else 8}
        text, style["color"] = f"{int(counts[row, column])}\n{share:.0%}", "white" if share > 0.55 else INK
        axes.text(column, row, text, **style)
    names = [name.replace("_", " ") for name in predictions.classes]
    turn = {"rotation": 40, "ha": "right"} if classes > 3 else {}
    axes.set_xticks(range(classes), names, **turn)
    axes.set_yticks(range(classes), names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    style_axes(axes, grid=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def roc_picture(predictions: Predictions, path: str | os.PathLike[str] | None = None) -> bytes:
    """ROC curve of the positive class, overall and by magnification; of many classes, each against the rest and their
    mean (macro average). The first curve, of all images, is drawn thickest.
    """
    figure = new_figure(*((4.4, 3.6) if len(predictions.classes) == 2 else (5.4, 4.6)))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
    curves = roc_curves(predictions)
    for number, (color, (name, false_rate, true_rate, area)) in enumerate(
        zip(cycle((INK, *PALETTE)), curves, strict=False)
    ):
        style: dict[str, Any] = {"linewidth": 1.2, "zorder": 2} if number else {"linewidth": 2.4, "zorder": 3}
        axes.plot(false_rate, true_rate, color=color, label=f"{name}  AUC {format_figure(area)}", **style)
    if curves:
        axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.55, "undefined: images of one class only", ha="center", color=MUTED, size=9)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set(xlabel="1 - specificity", ylabel="sensitivity (recall)", title="ROC")
    style_axes(axes)
    return save_figure(figure, path)


def history_picture(history: list[dict[str, Any]], path: str | os.PathLike[str] | None = None) -> bytes:
    """Losses, and validation accuracy and AUC, by epoch; nothing where there is no validation."""
    figure = new_figure(7.6, 2.9)
    left, right = figure.subplots(1, 2)
    lines = (
        (left, "training", [record["train_loss"] for record in history]),
        (left, "validation", [record["val_loss"] for record in history]),
        (right, "accuracy", [record["val"]["accuracy"] for record in history]),
        (right, "AUC", [record["val"]["auc"] for record in history]),
    )
    epochs = [record["epoch"] for record in history]
    for (axes, label, values), color in zip(lines, PALETTE, strict=False):
        values = [float("nan") if value is None else value for value in values]
        axes.plot(epochs, values, color=color, marker="o", ms=3, label=label)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    left.set_ylim(bottom=0)
    right.set(xlabel="epoch", title="Validation patients", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        style_axes(axes)
    return save_figure(figure, path)


def before_after_picture(
    pairs: list[tuple[str, Tensor, Tensor]], target: Tensor | None = None, path: str | os.PathLike[str] | None = None
) -> bytes:
    """A column for each (title, image, normalised image), both uint8 [3, H, W]; first the target, if given."""
    shift = int(target is not None)
    columns = len(pairs) + shift
    figure = new_figure(1.45 * columns + 0.3, 3.3)
    grid = figure.subplots(2, columns, squeeze=False)
    if target is not None:
        draw_image(grid[0][0], target)
        grid[0][0].set_title("stain target", size=8, color=INK)
        grid[1][0].set_visible(False)
    for column, (title, *images) in enumerate(pairs, shift):
        for row, image in enumerate(images):
            draw_image(grid[row][column], image)
        grid[0][column].set_title(title, size=8, color=INK)
    for row, name in enumerate(("before", "after")):
        grid[row][shift].set_ylabel(name, size=9, color=INK)
    return save_figure(figure, path)


def draw_image(axes: Any, image: Tensor) -> None:
    """An image uint8 [3, H, W] on `axes`, without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def roc_curves(predictions: Predictions) -> list[tuple[str, Any, Any, float]]:
    """The curves of `roc_picture`: name, false and true positive rates (arrays of equal length), area.

    Groups with images of one class only have no curve. The mean curve is the mean of true positive rates at each false
    positive rate; its area is the mean of the classes'.
    """
    functional = require("torchmetrics.functional.classification", extra="train", purpose="ROC curves")
    by_magnification = predictions.by_magnification()
    parts = {"all images": predictions, **(by_magnification if len(by_magnification) > 1 else {})}
    groups = [(name, part.probabilities[:, 1], part.targets == 1) for name, part in parts.items()]
    if len(predictions.classes) > 2:
        names = [name.replace("_", " ") for name in predictions.classes]
        groups = [(name, predictions.probabilities[:, k], predictions.targets == k) for k, name in enumerate(names)]
    curves = []
    for name, scores, truth in groups:
        if 0 < int(truth.sum()) < len(truth):
            false_rate, true_rate, _ = functional.binary_roc(scores, truth.long())
            curves.append((name, false_rate.numpy(), true_rate.numpy(), area_under_curve(scores, truth)))
    if len(predictions.classes) > 2 and len(curves) > 1:
        rates = np.unique(np.concatenate([false_rate for _, false_rate, _, _ in curves]))
        # where a curve jumps, np.interp gives its upper end, and of the curve read backwards its lower end
        upper = np.mean([np.interp(rates, x, y) for _, x, y, _ in curves], axis=0)
        lower = np.mean([np.interp(-rates, -x[::-1], y[::-1]) for _, x, y, _ in curves], axis=0)
        area = float(np.mean([area for _, _, _, area in curves]))
        curves.insert(0, ("mean of the classes", rates.repeat(2), np.stack([lower, upper], axis=1).ravel(), area))
    return curves
