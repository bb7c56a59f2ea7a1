"""Metrics, computed by torchmetrics; one that the images do not define is None, never 0."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ernet_fast._optional import require
from ernet_fast.train.predictions import Predictions

NAMES = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1", "auc")
_PURPOSE = "metrics"
# The predictions are those of all processes already: nothing must be summed over processes again.
_LOCAL = {"sync_on_compute": False}


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Counts [K, K] int64: row true class, column predicted class."""
    functional = require("torchmetrics.functional.classification", extra="train", purpose=_PURPOSE)
    return functional.multiclass_confusion_matrix(
        predictions.predicted, predictions.targets, num_classes=len(predictions.classes)
    )


def compute_metrics(predictions: Predictions) -> dict[str, float | int | None]:
    """Figures of one set of images.

    Two classes: the second (malignant) is the positive one; recall is sensitivity. More classes: precision, recall,
    specificity, F1 and AUC (one against the rest) are means over the classes that occur. Balanced accuracy is the mean
    recall of the classes that occur, and undefined with only one. None stands for a figure that is undefined, e.g. the
    AUC of images of one class.
    """
    if not len(predictions):
        return {"images": 0, **dict.fromkeys(NAMES)}
    counts = confusion_matrix(predictions)
    figures = _binary(predictions, counts) if len(predictions.classes) == 2 else _multiclass(predictions, counts)
    return {"images": len(predictions), **{name: figures[name] for name in NAMES}}


def metrics_by_magnification(predictions: Predictions) -> dict[str, dict[str, float | int | None]]:
    """`compute_metrics` of each magnification there is, by ``"40X"`` and so on."""
    found = sorted({sample.magnification for sample in predictions.samples})
    return {f"{m}X": compute_metrics(predictions.subset(lambda s, m=m: s.magnification == m)) for m in found}  # type: ignore[misc]


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


def _binary(predictions: Predictions, counts: Tensor) -> dict[str, float | None]:
    classification = require("torchmetrics.classification", extra="train", purpose=_PURPOSE)
    collection = require("torchmetrics", extra="train", purpose=_PURPOSE).MetricCollection(
        {
            "accuracy": classification.BinaryAccuracy(**_LOCAL),
            "precision": classification.BinaryPrecision(**_LOCAL),
            "recall": classification.BinaryRecall(**_LOCAL),
            "specificity": classification.BinarySpecificity(**_LOCAL),
            "f1": classification.BinaryF1Score(**_LOCAL),
        }
    )
    figures = _values(collection, predictions.predicted, predictions.targets)
    negatives, positives = (bool(total) for total in counts.sum(dim=1).tolist())
    auc = _values(_auc(classification.BinaryAUROC(**_LOCAL)), predictions.probabilities[:, 1], predictions.targets)
    defined = {
        "accuracy": True,
        "precision": bool(counts[:, 1].sum()),
        "recall": positives,
        "specificity": negatives,
        "f1": positives or bool(counts[:, 1].sum()),
        "auc": positives and negatives,
    }
    result: dict[str, float | None] = {
        name: value if defined[name] else None for name, value in (figures | auc).items()
    }
    recall, specificity = result["recall"], result["specificity"]
    result["balanced_accuracy"] = None if recall is None or specificity is None else (recall + specificity) / 2
    return result


def _multiclass(predictions: Predictions, counts: Tensor) -> dict[str, float | None]:
    classification = require("torchmetrics.classification", extra="train", purpose=_PURPOSE)
    settings: dict[str, Any] = {"num_classes": len(predictions.classes), "average": "none", **_LOCAL}
    collection = require("torchmetrics", extra="train", purpose=_PURPOSE).MetricCollection(
        {
            "precision": classification.MulticlassPrecision(**settings),
            "recall": classification.MulticlassRecall(**settings),
            "specificity": classification.MulticlassSpecificity(**settings),
            "f1": classification.MulticlassF1Score(**settings),
        }
    )
    per_class = _vectors(collection, predictions.predicted, predictions.targets)
    per_class |= _vectors(
        _auc(classification.MulticlassAUROC(**settings)), predictions.probabilities, predictions.targets
    )
    occurs = counts.sum(dim=1) > 0
    result: dict[str, float | None] = {name: _mean(values, occurs) for name, values in per_class.items()}
    several = int(occurs.sum()) > 1
    result["accuracy"] = float(counts.diagonal().sum() / counts.sum())
    result["balanced_accuracy"] = result["recall"] if several else None
    if not several:
        result["auc"] = result["specificity"] = None
    return result


def _auc(metric: Any) -> Any:
    return require("torchmetrics", extra="train", purpose=_PURPOSE).MetricCollection({"auc": metric})


def _vectors(collection: Any, *inputs: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about undefined figures, which are masked
        collection.update(*inputs)
        return {name: torch.as_tensor(value).double() for name, value in collection.compute().items()}


def _values(collection: Any, *inputs: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in _vectors(collection, *inputs).items()}


def _mean(values: Tensor, wanted: Tensor) -> float | None:
    chosen = values[wanted]
    return float(chosen.mean()) if len(chosen) else None
