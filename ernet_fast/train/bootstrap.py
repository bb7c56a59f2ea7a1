"""How far figures may move with other patients: the bootstrap over patients.

Images of one patient resemble each other, so patients are drawn, each with all images, as many as there are, with
replacement (Field & Welsh, J. R. Stat. Soc. B 69, 2007). A resample is a row of weights, how often each patient was
drawn, and every figure is computed for all resamples at once from sums by patient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernet_fast.train import metrics
from ernet_fast.train.predictions import Predictions

FIGURES = (*metrics.NAMES, *metrics.PATIENT_NAMES, "loss")
"""What there are intervals for."""
_LEAST_DEFINED = 0.9
_CHUNK = 2_000_000  # weights of images at a time: some tens of MB


@dataclass(frozen=True)
class Bootstrap:
    """How to resample: `resamples` draws of generator `seed`, and intervals of the confidence `level` (percentiles)."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.resamples, bool) or not isinstance(self.resamples, int) or self.resamples < 100:
            raise ValueError(f"resamples={self.resamples!r}; expected an integer of at least 100.")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level={self.level!r}; expected a number from 0.5 to below 1.")

    def weights(self, patients: int) -> Tensor:
        """How often each patient is drawn: [resamples, patients] float64; rows sum to `patients`."""
        generator = np.random.default_rng(self.seed)
        return torch.from_numpy(generator.multinomial(patients, [1 / patients] * patients, self.resamples)).double()

    def interval(self, values: Tensor) -> list[float] | None:
        """The two percentiles of `values` [resamples]; None where more than a tenth are NaN, i.e. undefined."""
        found = values[~values.isnan()].numpy()
        if len(found) < _LEAST_DEFINED * len(values):
            return None
        tail = (1 - self.level) / 2
        low, high = np.quantile(found, [tail, 1 - tail])
        return [float(low), float(high)]


class PatientSums:
    """What the figures of a set of images need, summed by patient, so that they follow from weights of patients."""

    def __init__(self, predictions: Predictions) -> None:
        self.scores, self.labels, self.patient = metrics.patient_predictions(predictions)
        self.probabilities, self.targets = predictions.probabilities.double(), predictions.targets
        classes, patients = len(predictions.classes), len(self.scores)
        self.counts = self._sum(
            torch.ones(len(predictions), 1, dtype=torch.float64),
            self.targets * classes + predictions.predicted, classes * classes,
        ).view(patients, classes, classes)  # fmt: skip
        bins, parts = metrics.calibration_bins(predictions)
        self.bins = self._sum(parts.double(), bins, metrics.BINS)
        true = self.probabilities[torch.arange(len(predictions)), self.targets]
        nothing = torch.zeros_like(self.targets)
        self.loss = self._sum(-true.clamp_min(1e-12).log()[:, None], nothing, 1)[:, 0, 0]
        self.images = self.counts.sum(dim=(1, 2))
        self.right = self.counts.diagonal(dim1=1, dim2=2).sum(dim=1) / self.images

    def _sum(self, values: Tensor, column: Tensor, columns: int) -> Tensor:
        """Sums [P, columns, V] over the images of each patient and column, of values [n, V]."""
        patients = len(self.scores)
        table = torch.zeros(patients * columns, values.shape[1], dtype=torch.float64)
        return table.index_add_(0, self.patient * columns + column, values).view(patients, columns, -1)

    def figures(self, weights: Tensor) -> dict[str, Tensor]:
        """Every figure of `FIGURES` [B] for weights [B, P] of the patients; NaN where undefined."""
        found = metrics.ratios(torch.einsum("bp,pij->bij", weights, self.counts))
        found["ece"] = metrics.calibration_error(torch.einsum("bp,pij->bij", weights, self.bins))
        found["loss"] = (weights @ self.loss) / (weights @ self.images)
        found["patient_recognition_rate"] = (weights @ self.right) / weights.sum(dim=1)
        found["auc"] = _mean_area(self.probabilities, self.targets, weights, self.patient)
        found["patient_auc"] = _mean_area(self.scores, self.labels, weights, torch.arange(len(self.scores)))
        return found


def _mean_area(scores: Tensor, targets: Tensor, weights: Tensor, patient: Tensor) -> Tensor:
    """As in `metrics.compute_metrics`, for each row of weights [B, P]; `patient` [n] of each score."""
    classes = scores.shape[1]
    areas = [_area(scores[:, k], targets == k, weights, patient) for k in ([1] if classes == 2 else range(classes))]
    if classes == 2:
        return areas[0]
    occurs = [_total(weights, patient, targets == k) > 0 for k in range(classes)]
    return metrics.mean_where(torch.stack(areas, dim=1), torch.stack(occurs, dim=1))


def _total(weights: Tensor, patient: Tensor, chosen: Tensor) -> Tensor:
    return weights @ torch.bincount(patient[chosen], minlength=weights.shape[1]).double()


def _area(scores: Tensor, truth: Tensor, weights: Tensor, patient: Tensor) -> Tensor:
    """Area under the ROC curve for each row of weights; NaN where no weight is on one of the two classes."""
    areas = []
    for false, true in roc_points(scores, truth, weights, patient):
        area = (false.diff(dim=1) * (true[:, 1:] + true[:, :-1])).sum(dim=1) / 2
        areas.append(area / (false[:, -1] * true[:, -1]))
    return torch.cat(areas)


def roc_points(scores: Tensor, truth: Tensor, weights: Tensor, patient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of false and of true positives at each threshold, [b, T] from 0 to all, for a few rows of weights at a
    time. Equal scores share a threshold.
    """
    order = scores.argsort(descending=True)
    ordered = scores[order]
    ends = torch.cat([(ordered[1:] != ordered[:-1]).nonzero().flatten(), torch.tensor([len(ordered) - 1])])
    positive, owner = truth[order].double(), patient[order]
    for part in weights.split(max(1, _CHUNK // len(scores))):
        drawn = part[:, owner]
        sums = [(drawn * kind).cumsum(dim=1)[:, ends] for kind in (1 - positive, positive)]
        start = torch.zeros(len(part), 1, dtype=torch.float64)
        yield torch.cat([start, sums[0]], dim=1), torch.cat([start, sums[1]], dim=1)


def intervals(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, list[float] | None]:
    """The interval of every figure of `FIGURES`: None for one that is undefined, or with fewer than two patients."""
    if not len(predictions):
        return dict.fromkeys(FIGURES)
    sums = PatientSums(predictions)
    patients = len(sums.scores)
    if patients < 2:
        return dict.fromkeys(FIGURES)
    itself = sums.figures(torch.ones(1, patients, dtype=torch.float64))
    drawn = sums.figures(bootstrap.weights(patients))
    return {n: None if math.isnan(float(itself[n])) else bootstrap.interval(drawn[n]) for n in FIGURES}


def all_intervals(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Any]:
    """`intervals` of all images and of each magnification, with the settings that made them, as plain values."""
    by_magnification = {name: intervals(part, bootstrap) for name, part in predictions.by_magnification().items()}
    settings = {"level": bootstrap.level, "resamples": bootstrap.resamples, "seed": bootstrap.seed}
    overall = intervals(predictions, bootstrap)
    return {**settings, "over": "patients", "overall": overall, "by_magnification": by_magnification}


def roc_band(predictions: Predictions, bootstrap: Bootstrap, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Pointwise interval of the sensitivity at each false positive rate of `rates`: of the second of two classes; of
    more, of the mean over the classes that a draw holds, one against the rest.

    Returns lower and upper bounds; None where the curve or the interval is undefined.
    """
    if not len(predictions):
        return None
    classes, targets = len(predictions.classes), predictions.targets
    patients, _, patient = metrics.patient_predictions(predictions)
    if len(patients) < 2:
        return None
    weights = bootstrap.weights(len(patients))
    total, count = np.zeros((bootstrap.resamples, len(rates))), np.zeros((bootstrap.resamples, 1))
    for k in [1] if classes == 2 else range(classes):
        truth = targets == k
        if 0 < int(truth.sum()) < len(truth):
            curves = _roc_curves(predictions.probabilities[:, k], truth, weights, patient, rates)
            defined = np.isfinite(curves[:, :1])
            total, count = total + np.where(defined, curves, 0.0), count + defined
    drawn = total[count[:, 0] > 0] / count[count > 0][:, None]
    if len(drawn) < _LEAST_DEFINED * bootstrap.resamples:
        return None
    tail = (1 - bootstrap.level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return low, high


def _roc_curves(scores: Tensor, truth: Tensor, weights: Tensor, patient: Tensor, rates: np.ndarray) -> np.ndarray:
    """Sensitivity [B, R] at each rate for each row of weights; NaN where no weight is on one of the two classes."""
    curves = []
    for false, true in roc_points(scores, truth, weights, patient):
        for x, y in zip(false.numpy(), true.numpy(), strict=True):
            there = x[-1] > 0 and y[-1] > 0
            curves.append(np.interp(rates, x / x[-1], y / y[-1]) if there else np.full(len(rates), math.nan))
    return np.array(curves)
