"""Two runs on the same images: differences of all figures, over patients.

Intervals are of the paired bootstrap: both runs are computed for the same draws of patients, so what makes some
patients hard for both falls out of the difference. P-values are of the paired permutation test: were the runs alike,
each patient's predictions might as well be exchanged between them; it holds its level with few patients, too. DeLong's
test (Biometrics 44, 1988) takes images as independent, which those of a patient are not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ernet_fast.console.tables import format_difference, format_figure, format_interval
from ernet_fast.train.bootstrap import FIGURES, Bootstrap, PatientSums
from ernet_fast.train.predictions import Predictions

TABLE = "predictions.csv"
_NAMED = 3


class Difference(NamedTuple):
    """A figure of two runs. None: undefined."""

    figure: str
    first: float | None
    second: float | None
    difference: float | None  # second - first
    interval: list[float] | None  # of the difference
    p_value: float | None  # two-sided, of no difference


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, overall and by magnification; `settings` are those of the runs that differ."""

    images: int
    patients: int
    bootstrap: Bootstrap
    overall: tuple[Difference, ...]
    by_magnification: dict[str, tuple[Difference, ...]]
    settings: dict[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        bootstrap = self.bootstrap
        parts = {name: [d._asdict() for d in found] for name, found in self.by_magnification.items()}
        return {
            "images": self.images, "patients": self.patients, "level": bootstrap.level,
            "resamples": bootstrap.resamples, "seed": bootstrap.seed, "overall": [d._asdict() for d in self.overall],
            "by_magnification": parts,
            "settings": {name: list(values) for name, values in self.settings.items()},
        }  # fmt: skip


def compare(
    first: Predictions,
    second: Predictions,
    bootstrap: Bootstrap = Bootstrap(),  # noqa: B008, frozen
    *,
    settings: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
) -> Comparison:
    """Differences (second - first) of the figures of two runs on the same images.

    The p-value is the share of exchanges of patients between the runs whose difference is at least as large, either
    way: of all 2^patients of them, or, where these are more than `bootstrap.resamples`, of as many at random, one added
    to both counts. It is never below 2 / 2^patients. Nothing corrects it for the number of figures.

    Raises:
        ValueError: the images, their classes or patients, or the names of the classes are not the same.
    """
    second = in_order_of(first, second)
    patients = len({sample.patient for sample in first.samples})
    mine, others = first.by_magnification(), second.by_magnification()
    parts = {name: _differences(part, others[name], bootstrap) for name, part in mine.items() if len(mine) > 1}
    names = [name for name in {**settings[0], **settings[1]} if settings[0].get(name) != settings[1].get(name)]
    return Comparison(
        len(first), patients, bootstrap, _differences(first, second, bootstrap), parts,
        {name: (settings[0].get(name), settings[1].get(name)) for name in names},
    )  # fmt: skip


def in_order_of(first: Predictions, second: Predictions) -> Predictions:
    """`second` with its images in the order of `first`; ValueError names what is not the same."""
    if first.classes != second.classes:
        raise ValueError(f"the runs have classes {first.classes} and {second.classes}; expected the same.")
    if not len(first):
        raise ValueError("the first run has no images; expected the same images in both.")
    rows = {sample.name: row for row, sample in enumerate(second.samples)}
    names = [sample.name for sample in first.samples]
    only = [sorted(set(names) - set(rows)), sorted(set(rows) - set(names))]
    if any(only):
        found = [
            f"{len(images)} only in the {which} (e.g. {', '.join(images[:_NAMED])})"
            for which, images in zip(("first", "second"), only, strict=True)
            if images
        ]
        raise ValueError(
            f"the runs are not of the same images: {'; '.join(found)}. Evaluate both with the same --data, --split and "
            "--magnifications; runs with other seeds or split_by have other test images, unless --split-file names one."
        )
    if len(rows) != len(names) or len(rows) != len(second.samples):
        raise ValueError("an image name occurs twice in a run; expected each once.")
    order = [rows[name] for name in names]
    for one, other in zip(first.samples, (second.samples[row] for row in order), strict=True):
        if (one.label, one.patient, one.magnification) != (other.label, other.patient, other.magnification):
            raise ValueError(
                f"{one.name} is class {first.classes[one.label]}, patient {one.patient}, {one.magnification}X in the "
                f"first run, and {first.classes[other.label]}, {other.patient}, {other.magnification}X in the second."
            )
    return Predictions(second.probabilities[order], tuple(second.samples[row] for row in order), second.classes)


def _differences(first: Predictions, second: Predictions, bootstrap: Bootstrap) -> tuple[Difference, ...]:
    sums = [PatientSums(first), PatientSums(second)]
    patients = len(sums[0].scores)
    ones = torch.ones(1, patients, dtype=torch.float64)
    itself = [{name: float(value) for name, value in part.figures(ones).items()} for part in sums]
    weights = bootstrap.weights(patients)
    drawn = [part.figures(weights) for part in sums]
    exchanged = _exchanged(first, second, bootstrap, patients)
    found = []
    for name in FIGURES:
        values = [None if math.isnan(part[name]) else part[name] for part in itself]
        if None in values or patients < 2:
            found.append(Difference(name, values[0], values[1], None, None, None))
            continue
        difference = itself[1][name] - itself[0][name]
        p_value = _share(exchanged[name], difference, exact=2**patients <= bootstrap.resamples)
        interval = bootstrap.interval(drawn[1][name] - drawn[0][name])
        found.append(Difference(name, values[0], values[1], difference, interval, p_value))
    return tuple(found)


def _exchanged(first: Predictions, second: Predictions, bootstrap: Bootstrap, patients: int) -> dict[str, Tensor]:
    """Differences of every figure where the runs have exchanged some patients: all choices of them, or random ones."""
    samples = [s._replace(patient=f"{run}/{s.patient}") for run, p in enumerate((first, second)) for s in p.samples]
    both = torch.cat([first.probabilities, second.probabilities])
    sums = PatientSums(
        Predictions(both, tuple(samples), first.classes)
    )  # the patients of the first run, then of the other
    if 2**patients <= bootstrap.resamples:
        chosen = np.arange(2**patients)[:, None] >> np.arange(patients) & 1
    else:
        chosen = np.random.default_rng(bootstrap.seed).integers(0, 2, (bootstrap.resamples, patients))
    moved = torch.from_numpy(chosen).double()
    mine, others = (sums.figures(torch.cat(pair, dim=1)) for pair in ((1 - moved, moved), (moved, 1 - moved)))
    return {name: others[name] - mine[name] for name in FIGURES}


def _share(exchanged: Tensor, difference: float, *, exact: bool) -> float:
    """The p-value: how many of the differences are as large as `difference`, but for rounding."""
    found = exchanged[~exchanged.isnan()]
    count = int((found.abs() >= abs(difference) - 1e-12).sum())
    return count / len(found) if exact else (count + 1) / (len(found) + 1)


def read_predictions(folder: str | os.PathLike[str]) -> Predictions:
    """The predictions that `ernet-fast evaluate --out` wrote into a folder."""
    return Predictions.read_csv(Path(folder) / TABLE)


HEADER = ("figure", "first", "second", "difference", "interval", "p")


def difference_rows(differences: Sequence[Difference]) -> list[list[str]]:
    """Rows of a table under `HEADER`."""
    rows = []
    for found in differences:
        p = "-" if found.p_value is None else f"{found.p_value:.4f}"
        figures = [format_figure(found.first), format_figure(found.second), format_difference(found.difference)]
        rows.append([found.figure.replace("_", " "), *figures, format_interval(found.interval), p])
    return rows
