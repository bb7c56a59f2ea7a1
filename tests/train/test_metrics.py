"""Figures of merit against counts made by hand and scikit-learn; undefined ones are None."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import Sample
from ernet_fast.train import Predictions, compute_metrics, metrics_by_magnification, patient_recognition_rate
from ernet_fast.train.metrics import confusion_matrix, patient_scores

FLOAT32_ROUNDING = 1e-6  # torchmetrics divides counts in float32


def sample(label: int, patient: str = "1", magnification: int = 100, number: int = 0) -> Sample:
    return Sample(
        Path(f"{patient}-{magnification}-{number}.png"), label, "A", f"14-{patient}", patient, magnification, "001"
    )


def binary(labels, scores, **where) -> Predictions:
    table = torch.tensor([[1 - s, s] for s in scores], dtype=torch.float64)
    return Predictions(
        table, tuple(sample(label, number=i, **where) for i, label in enumerate(labels)), ("benign", "malignant")
    )


def test_binary_by_hand():
    # true positives 2, false negatives 1, false positives 1, true negatives 1
    found = compute_metrics(binary([1, 1, 1, 0, 0], [0.9, 0.8, 0.3, 0.6, 0.1]))
    expected = {
        "images": 5, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "specificity": 1 / 2, "f1": 2 / 3,
        "balanced_accuracy": (2 / 3 + 1 / 2) / 2,
        "auc": 5 / 6,  # of the 6 pairs of a malignant and a benign image, only (0.3, 0.6) is in the wrong order
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=FLOAT32_ROUNDING)


def test_confusion_matrix_has_truth_in_rows():
    assert confusion_matrix(binary([1, 1, 1, 0, 0], [0.9, 0.8, 0.3, 0.6, 0.1])).tolist() == [[1, 1], [1, 2]]


def test_undefined_figures_are_none():
    only_malignant = compute_metrics(binary([1, 1], [0.9, 0.2]))
    assert [only_malignant[name] for name in ("auc", "specificity", "balanced_accuracy")] == [None] * 3
    assert only_malignant["recall"] == 0.5
    only_benign = compute_metrics(binary([0, 0], [0.1, 0.2]))
    assert [only_benign[name] for name in ("auc", "recall", "precision", "f1")] == [None] * 4
    assert only_benign["specificity"] == 1.0
    never_positive = compute_metrics(binary([0, 1], [0.1, 0.2]))
    assert never_positive["precision"] is None and never_positive["recall"] == 0.0 and never_positive["auc"] == 1.0
    empty = compute_metrics(Predictions(torch.empty(0, 2, dtype=torch.float64), (), ("benign", "malignant")))
    assert empty["images"] == 0 and empty["accuracy"] is None


def test_many_classes_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(3)
    classes, count = 4, 200
    truth = generator.integers(0, classes - 1, count)  # the last class never occurs
    logits = generator.normal(size=(count, classes)) + 1.5 * np.eye(classes)[truth]
    table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    samples = tuple(sample(int(label), number=i) for i, label in enumerate(truth))
    found = compute_metrics(Predictions(torch.from_numpy(table), samples, ("a", "b", "c", "d")))
    guess, present = table.argmax(axis=1), [0, 1, 2]
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(truth, guess, labels=present, average="macro")
    auc = np.mean([sklearn.roc_auc_score(truth == k, table[:, k]) for k in present])
    expected = {"accuracy": np.mean(truth == guess), "precision": precision, "recall": recall, "f1": f1, "auc": auc,
                "balanced_accuracy": recall}  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=FLOAT32_ROUNDING), name


def test_one_class_of_many_leaves_auc_undefined():
    table = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    found = compute_metrics(Predictions(table, tuple(sample(0, number=i) for i in range(3)), ("a", "b", "c")))
    assert found["auc"] is None and found["specificity"] is None and found["accuracy"] == pytest.approx(2 / 3)


def test_by_magnification_and_patient():
    parts = [
        binary([1, 0], [0.9, 0.2], patient="1", magnification=40),
        binary([1, 0, 0], [0.1, 0.2, 0.7], patient="2", magnification=400),
    ]
    both = Predictions(
        torch.cat([part.probabilities for part in parts]), parts[0].samples + parts[1].samples, parts[0].classes
    )
    by_magnification = metrics_by_magnification(both)
    assert list(by_magnification) == ["40X", "400X"]
    assert by_magnification["40X"]["accuracy"] == 1.0
    assert by_magnification["400X"]["accuracy"] == pytest.approx(1 / 3)
    assert patient_scores(both) == {"1": 1.0, "2": pytest.approx(1 / 3)}
    assert patient_recognition_rate(both) == pytest.approx((1 + 1 / 3) / 2)  # patients count equally, images do not


def test_loss_is_the_cross_entropy():
    assert binary([1, 0], [0.5, 0.75]).loss() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected \(1, 2\)"):
        Predictions(torch.zeros(1, 3), (sample(0),), ("a", "b"))
