"""Metrics: ratios of the confusion matrix, AUC, calibration; one that the images do not define is None, never 0."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ernet_fast._optional import require
from ernet_fast.train.predictions import Predictions

NAMES = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "mcc", "auc", "ece")
"""Figures of a set of images."""
PATIENT_NAMES = ("patient_recognition_rate", "patient_auc")
"""Figures of a set of patients."""
BINS = 15
"""Bins of confidence, of equal width, of the calibration error (Guo et al., ICML 2017)."""


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Counts [K, K] int64: row true class, column predicted class."""
    functional = require("torchmetrics.functional.classification", extra="train", purpose="metrics")
    return functional.multiclass_confusion_matrix(
        predictions.predicted, predictions.targets, num_classes=len(predictions.classes)
    )


def area_under_curve(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of `scores` [n] for the images that are `truth` [n]; NaN where all or none are."""
    functional = require("torchmetrics.functional.classification", extra="train", purpose="metrics")
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    rates = functional.binary_roc(scores, truth.long())[:2]
    # torchmetrics' rates are float32, whose area of a perfect order is 0.9999999: back to whole images
    false, true = ((rate.double() * count).round() for rate, count in zip(rates, (negatives, positives), strict=True))
    return float(torch.trapezoid(true, false)) / (positives * negatives)


def ratios(counts: Tensor) -> dict[str, Tensor]:
    """Figures [...] of confusion matrices [..., K, K] float64, row true class; NaN where undefined.

    Everything in `NAMES` but AUC and ECE. F1 is 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall.
    MCC is Gorodkin's coefficient of K classes (Comput. Biol. Chem. 28, 2004); of two, Matthews's; undefined where all
    images are, or are called, one class.
    """
    right, true, guessed = counts.diagonal(dim1=-2, dim2=-1), counts.sum(dim=-1), counts.sum(dim=-2)  # [..., K]
    total = true.sum(dim=-1)
    rest = total[..., None] - true
    by_class = {  # [..., K]; 0 / 0 is NaN where undefined
        "precision": right / guessed,
        "recall": right / true,
        "specificity": (rest - guessed + right) / rest,
        "f1": 2 * right / (true + guessed),
    }
    occurs = true > 0
    if counts.shape[-1] == 2:
        figures = {name: values[..., 1] for name, values in by_class.items()}
    else:  # a class that occurs and is never predicted has precision 0
        precision = by_class["precision"].nan_to_num()
        figures = {name: mean_where(values, occurs) for name, values in (by_class | {"precision": precision}).items()}
    hits = right.sum(dim=-1)
    figures["accuracy"] = hits / total
    balanced = mean_where(by_class["recall"], occurs)
    figures["balanced_accuracy"] = balanced.masked_fill(occurs.sum(dim=-1) < 2, math.nan)
    spread = (total**2 - guessed.square().sum(dim=-1)) * (total**2 - true.square().sum(dim=-1))
    figures["mcc"] = (hits * total - (guessed * true).sum(dim=-1)) / spread.sqrt()
    return figures


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the `values` that `mask` selects; NaN if one of them is, or there are none."""
    return values.where(mask, torch.zeros_like(values)).sum(dim=-1) / mask.sum(dim=-1)


def calibration_bins(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Bin of each image [n] by its confidence, the highest probability; and (1, confidence, right or not) [n, 3]."""
    confidence = predictions.probabilities.max(dim=1).values
    right = predictions.predicted == predictions.targets
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    return bins, torch.stack([torch.ones_like(confidence), confidence, right.to(confidence.dtype)], dim=1)


def calibration_error(sums: Tensor) -> Tensor:
    """Expected calibration error [...] of sums [..., BINS, 3] over the images of each bin: the mean over all images of
    the difference between their bin's mean confidence and its accuracy.
    """
    return (sums[..., 1] - sums[..., 2]).abs().sum(dim=-1) / sums[..., 0].sum(dim=-1)


def calibration_table(predictions: Predictions) -> Tensor:
    """The sums [BINS, 3] of `calibration_error`: images, their confidence, those that are right."""
    bins, parts = calibration_bins(predictions)
    return torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, bins, parts)


def compute_metrics(predictions: Predictions) -> dict[str, float | int | None]:
    """Figures of one set of images.

    Two classes: the second (malignant) is the positive one; recall is sensitivity. More classes: precision, recall,
    specificity, F1 and AUC (one against the rest) are means over the classes that occur. Balanced accuracy is the mean
    recall of the classes that occur, and undefined with only one. ECE is the expected calibration error of the
    predicted class. None stands for a figure that is undefined, e.g. the AUC of images of one class.
    """
    if not len(predictions):
        return {"images": 0, **dict.fromkeys(NAMES)}
    counts = confusion_matrix(predictions).double()
    figures: dict[str, float] = {name: float(value) for name, value in ratios(counts).items()}
    figures["auc"] = _mean_area(predictions.probabilities, predictions.targets)
    figures["ece"] = float(calibration_error(calibration_table(predictions)))
    return {"images": len(predictions), **defined(figures, NAMES)}


def defined(figures: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float | None]:
    """`figures` in the order of `names`, None in place of NaN."""
    return {name: None if math.isnan(figures[name]) else figures[name] for name in names}


def _mean_area(scores: Tensor, targets: Tensor) -> float:
    """AUC of the second class of two; of more, the mean of one against the rest over the classes that occur."""
    classes = scores.shape[1]
    chosen = [1] if classes == 2 else [k for k in range(classes) if bool((targets == k).any())]
    areas = [area_under_curve(scores[:, k], targets == k) for k in chosen]
    return sum(areas) / len(areas)


def metrics_by_magnification(predictions: Predictions) -> dict[str, dict[str, float | int | None]]:
    """`compute_metrics` of each magnification there is, by ``"40X"`` and so on."""
    return {name: compute_metrics(part) for name, part in predictions.by_magnification().items()}


def patient_scores(predictions: Predictions) -> dict[str, float]:
    """Share of each patient's images that are classified correctly (the patient score of Spanhol et al.)."""
    right: dict[str, list[bool]] = defaultdict(list)
    for sample, guess in zip(predictions.samples, predictions.predicted.tolist(), strict=True):
        right[sample.patient].append(sample.label == guess)
    return {patient: sum(hits) / len(hits) for patient, hits in sorted(right.items())}


def patient_recognition_rate(predictions: Predictions) -> float | None:
    """Mean of `patient_scores`, each patient counting once (Spanhol et al., IEEE TBME 63(7), 2016)."""
    scores = patient_scores(predictions)
    return sum(scores.values()) / len(scores) if scores else None


def patient_predictions(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Of the patients in the order of their names: mean probabilities [P, K] over their images, classes [P] (that of
    most of a patient's images, the first of equals); and the patient of each image [n].
    """
    names = sorted({sample.patient for sample in predictions.samples})
    rows = {name: row for row, name in enumerate(names)}
    patient = torch.tensor([rows[sample.patient] for sample in predictions.samples], dtype=torch.int64)
    sums = torch.zeros(len(names), len(predictions.classes), dtype=torch.float64)
    sums.index_add_(0, patient, predictions.probabilities.double())
    labels: list[Counter[int]] = [Counter() for _ in names]
    for row, label in zip(patient.tolist(), predictions.targets.tolist(), strict=True):
        labels[row][label] += 1
    classes = [min(found, key=lambda label, found=found: (-found[label], label)) for found in labels]  # type: ignore[misc]
    counts = torch.bincount(patient, minlength=len(names))
    return sums / counts[:, None], torch.tensor(classes, dtype=torch.int64), patient


def patient_metrics(predictions: Predictions) -> dict[str, float | int | None]:
    """Figures in which each patient counts once: the recognition rate, and the AUC of the patients' mean probabilities
    (of more than two classes, one against the rest, the mean over the classes that occur).
    """
    if not len(predictions):
        return {"patients": 0, **dict.fromkeys(PATIENT_NAMES)}
    scores, classes, _ = patient_predictions(predictions)
    rate, area = patient_recognition_rate(predictions), _mean_area(scores, classes)
    assert rate is not None
    return {"patients": len(scores), **defined({PATIENT_NAMES[0]: rate, PATIENT_NAMES[1]: area}, PATIENT_NAMES)}
