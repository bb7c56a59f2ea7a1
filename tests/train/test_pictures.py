"""Curves and tables of a report say what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.console.tables import format_figure
from ernet_fast.data import Sample
from ernet_fast.train import Predictions, compute_metrics, pictures, report

FLOAT32_ROUNDING = 1e-6  # torchmetrics computes curves in float32


def predictions(classes: int, count: int = 120) -> Predictions:
    generator = np.random.default_rng(classes)
    truth = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes)) + np.eye(classes)[truth]
    table = torch.from_numpy(logits).softmax(dim=1)
    samples = tuple(
        Sample(Path(f"{i}.png"), int(label), "A", "14-1", "1", (40, 100)[i % 2], "001") for i, label in enumerate(truth)
    )
    return Predictions(table, samples, tuple(f"class_{k}" for k in range(classes)))


def test_of_many_classes_the_thick_curve_is_their_mean():
    made = predictions(8)
    (name, x, y, area), *others = pictures.roc_curves(made)
    assert name == "mean of the classes" and [other[0] for other in others] == [f"class {k}" for k in range(8)]
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1) and (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
    assert area == pytest.approx(compute_metrics(made)["auc"], abs=FLOAT32_ROUNDING)
    assert np.trapezoid(y, x) == pytest.approx(area, abs=FLOAT32_ROUNDING), "the curve is that of the area beside it"


def test_of_two_classes_the_thick_curve_is_of_all_images():
    assert [curve[0] for curve in pictures.roc_curves(predictions(2))] == ["all images", "40X", "100X"]


@pytest.mark.parametrize("classes", [2, 8])
def test_every_square_of_a_confusion_matrix_has_count_and_share(monkeypatch, classes):
    figures = []
    real = pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *size: figures.append(real(*size)) or figures[-1])
    made = predictions(classes)
    pictures.confusion_picture(made)
    counts = pictures.confusion_matrix(made)
    expected = [f"{int(c)}\n{float(c) / int(row.sum()):.0%}" for row in counts for c in row]
    assert [text.get_text() for text in figures[0].axes[0].texts] == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.99957, "0.9996"), (0.9999999, "0.9999999"), (1.0, "1.000"), (0.0, "0.000"), (0.00004, "0.00004"),
        (0.5, "0.500"), (0.9994, "0.999"), (None, "-"), (7, "7"), (-0.25, "-0.250"),
    ],
)  # fmt: skip
def test_a_figure_is_not_rounded_to_perfection(value, text):
    assert format_figure(value) == text


def test_long_settings_wrap_and_rows_stack_on_a_phone(tmp_path):
    page = report.write_report(tmp_path / "r.html", title="t", subtitle="s", blocks=[]).read_text()
    style = page[page.index("<style>") : page.index("</style>")]
    assert "table.text td { overflow-wrap: anywhere; }" in style
    assert "max-width: 640px" in style and "table.text td { display: block" in style
