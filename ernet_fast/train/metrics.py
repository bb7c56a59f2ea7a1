"""Metrics: ratios of the confusion matrix, and AUC; one that the images do not define is None, never 0."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from ernet_fast._optional import require
from ernet_fast.train.predictions import Predictions

NAMES = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "auc")


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Counts [K, K] int64: row true class, column predicted class."""
    functional = require("torchmetrics.functional.classification", extra="train", purpose="metrics")
    return functional.multiclass_confusion_matrix(
        predictions.predicted, predictions.targets, num_classes=len(predictions.classes)
    )


def area_under_curve(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of `scores` [n] for the images that are `truth` [n]; NaN where all or none are."""
    functional = require("torchmetrics.functional.classification", extra="train", purpose="metrics")
    defined = 0 < int(truth.sum()) < len(truth)
    return float(functional.binary_auroc(scores, truth.long())) if defined else float("nan")


def compute_metrics(predictions: Predictions) -> dict[str, float | int | None]:
    """Figures of one set of images.

    Two classes: the second (malignant) is the positive one; recall is sensitivity. More classes: precision, recall,
    specificity, F1 and AUC (one against the rest) are means over the classes that occur. Balanced accuracy is the mean
    recall of the classes that occur, and undefined with only one. None stands for a figure that is undefined, e.g. the
    AUC of images of one class.
    """
    if not len(predictions):
        return {"images": 0, **dict.fromkeys(NAMES)}
    counts = confusion_matrix(predictions).double()
    right, true, guessed, total = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0), counts.sum()
    areas = [area_under_curve(s, predictions.targets == k) for k, s in enumerate(predictions.probabilities.T)]
    by_class = {  # [K]; 0 / 0 is NaN where undefined
        "precision": right / guessed,
        "recall": right / true,
        "specificity": (total - true - guessed + right) / (total - true),
        "f1": 2 * right / (true + guessed),
        "auc": torch.tensor(areas, dtype=torch.float64),
    }
    occurs = true > 0
    if len(counts) == 2:
        figures = {name: float(values[1]) for name, values in by_class.items()}
    else:  # a class that occurs and is never predicted has precision 0
        by_class["precision"] = by_class["precision"].nan_to_num()
        figures = {name: float(values[occurs].mean()) for name, values in by_class.items()}
    figures["accuracy"] = float(right.sum() / total)
    figures["balanced_accuracy"] = float(by_class["recall"][occurs].mean()) if occurs.sum() > 1 else float("nan")
    defined = {name: None if math.isnan(figures[name]) else figures[name] for name in NAMES}
    return {"images": len(predictions), **defined}


def metrics_by_magnification(predictions: Predictions) -> dict[str, dict[str, float | int | None]]:
    """`compute_metrics` of each magnification there is, by ``"40X"`` and so on."""
    return {name: compute_metrics(part) for name, part in predictions.by_magnification().items()}


def patient_scores(predictions: Predictions) -> dict[str, float]:
    """Share of each patient's images that are classified correctly."""
    right: dict[str, list[bool]] = defaultdict(list)
    for sample, guess in zip(predictions.samples, predictions.predicted.tolist(), strict=True):
        right[sample.patient].append(sample.label == guess)
    return {patient: sum(hits) / len(hits) for patient, hits in sorted(right.items())}


def patient_recognition_rate(predictions: Predictions) -> float | None:
    """Mean of `patient_scores`, each patient counting once (Spanhol et al., IEEE TBME 63(7), 2016)."""
    scores = patient_scores(predictions)
    return sum(scores.values()) / len(scores) if scores else None
