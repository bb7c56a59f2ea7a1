"""Figures of merit against counts made by hand and scikit-learn; undefined ones are None."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import Sample
from ernet_fast.train import (
    Predictions,
    compute_metrics,
    metrics_by_magnification,
    patient_metrics,
    patient_recognition_rate,
)  # fmt: skip
from ernet_fast.train.metrics import BINS, calibration_table, confusion_matrix, patient_scores

FLOAT32_ROUNDING = 1e-6  # of scikit-learn's sums and torchmetrics' float32


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
        "mcc": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2),  # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN))
        # confidences 0.9 and 0.9 (right) share a bin; 0.8 (right), 0.7 and 0.6 (wrong) have one each
        "ece": (abs(1.8 - 2) + abs(0.8 - 1) + 0.7 + 0.6) / 5,
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
                "balanced_accuracy": recall, "mcc": sklearn.matthews_corrcoef(truth, guess),
                "specificity": np.mean([np.mean(guess[truth != k] != k) for k in present])}  # fmt: skip
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


def random_binary(count: int = 300, seed: int = 5) -> tuple[Predictions, np.ndarray, np.ndarray]:
    """Predictions of images of 12 patients with true classes and scores of the second class, some of them equal."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, count)
    scores = np.round(1 / (1 + np.exp(-generator.normal(size=count) - truth)), 2)
    samples = tuple(sample(int(label), patient=f"{i % 12:02}", number=i) for i, label in enumerate(truth))
    table = torch.from_numpy(np.stack([1 - scores, scores], axis=1))
    return Predictions(table, samples, ("benign", "malignant")), truth, scores


def test_two_classes_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    made, truth, scores = random_binary()
    guess = made.predicted.numpy()
    expected = {
        "accuracy": sklearn.accuracy_score(truth, guess),
        "balanced_accuracy": sklearn.balanced_accuracy_score(truth, guess),
        "precision": sklearn.precision_score(truth, guess),
        "recall": sklearn.recall_score(truth, guess),
        "specificity": sklearn.recall_score(truth, guess, pos_label=0),
        "f1": sklearn.f1_score(truth, guess),
        "mcc": sklearn.matthews_corrcoef(truth, guess),
        "auc": sklearn.roc_auc_score(truth, scores),
    }
    found = compute_metrics(made)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=FLOAT32_ROUNDING), name
    assert made.loss() == pytest.approx(sklearn.log_loss(truth, scores.clip(1e-12, 1)))


@pytest.mark.parametrize("classes", [2, 5])
def test_against_torchmetrics(classes):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = np.random.default_rng(classes)
    truth = generator.integers(0, classes, 400)
    table = torch.from_numpy(generator.normal(size=(400, classes)) + 1.5 * np.eye(classes)[truth]).softmax(dim=1)
    made = Predictions(table, tuple(sample(int(k), number=i) for i, k in enumerate(truth)), tuple("abcde"[:classes]))
    found = compute_metrics(made)
    mcc = functional.multiclass_matthews_corrcoef(made.predicted, made.targets, num_classes=classes)
    ece = functional.multiclass_calibration_error(table, made.targets, num_classes=classes, n_bins=BINS, norm="l1")
    assert found["mcc"] == pytest.approx(float(mcc), abs=FLOAT32_ROUNDING)
    assert found["ece"] == pytest.approx(float(ece), abs=FLOAT32_ROUNDING)


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    found = compute_metrics(random_binary()[0])
    p, r = found["precision"], found["recall"]
    assert found["f1"] == pytest.approx(2 * p * r / (p + r), abs=FLOAT32_ROUNDING)


def test_a_perfect_order_has_exactly_area_one():
    labels = [0] * 60 + [1] * 67
    assert compute_metrics(binary(labels, np.linspace(0.1, 0.9, 127)))["auc"] == 1.0


def test_mcc_of_a_constant_network_is_undefined():
    assert compute_metrics(binary([0, 1, 1], [0.6, 0.7, 0.8]))["mcc"] is None
    assert compute_metrics(binary([0, 1, 1], [0.1, 0.7, 0.8]))["mcc"] == 1.0
    assert compute_metrics(binary([0, 1], [0.9, 0.2]))["mcc"] == -1.0


def test_the_calibration_table_holds_every_image_once():
    made, truth, scores = random_binary()
    table = calibration_table(made)
    assert table.shape == (BINS, 3) and table.sum(dim=0).tolist() == pytest.approx(
        [len(truth), np.maximum(scores, 1 - scores).sum(), (made.predicted.numpy() == truth).sum()]
    )
    certain = Predictions(torch.eye(2, dtype=torch.float64), (sample(0), sample(0)), ("benign", "malignant"))
    assert calibration_table(certain)[-1].tolist() == [2, 2, 1] and compute_metrics(certain)["ece"] == 0.5


def test_patient_figures():
    """Of patients 1 (malignant), 2 and 3 (benign): mean scores 0.6, 0.65 and 0.1, so one pair of two is in order."""
    parts = [([1, 1], [0.9, 0.3], "1"), ([0, 0, 0], [0.75, 0.6, 0.6], "2"), ([0], [0.1], "3")]
    made = [binary(labels, scores, patient=patient) for labels, scores, patient in parts]
    both = Predictions(
        torch.cat([part.probabilities for part in made]), sum((part.samples for part in made), ()), made[0].classes
    )
    found = patient_metrics(both)
    assert found["patients"] == 3 and found["patient_auc"] == 0.5
    assert found["patient_recognition_rate"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert patient_metrics(made[0]) == {"patients": 1, "patient_recognition_rate": 0.5, "patient_auc": None}
    nothing = Predictions(torch.empty(0, 2, dtype=torch.float64), (), made[0].classes)
    assert patient_metrics(nothing) == {"patients": 0, "patient_recognition_rate": None, "patient_auc": None}


def test_predictions_come_back_from_their_file_with_every_digit(tmp_path):
    made, *_ = random_binary()
    exact = Predictions(made.probabilities / 3 + 1 / 6, made.samples, made.classes)
    exact.write_csv(tmp_path / "predictions.csv")
    found = Predictions.read_csv(tmp_path / "predictions.csv")
    assert torch.equal(found.probabilities, exact.probabilities) and found.classes == exact.classes
    assert compute_metrics(found) == compute_metrics(exact) and patient_metrics(found) == patient_metrics(exact)
    assert [sample.name for sample in found.samples] == [sample.name for sample in exact.samples]


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path):
    class InFolder(Sample):
        @property
        def name(self):
            return f"{self.patient}/{self.path.stem}"

    samples = tuple(InFolder(*sample(1, patient=patient)) for patient in ("a", "b"))
    samples = tuple(one._replace(path=Path("x/1.png")) for one in samples)
    Predictions(torch.full((2, 2), 0.5), samples, ("n", "p")).write_csv(tmp_path / "p.csv")
    assert [one.name for one in Predictions.read_csv(tmp_path / "p.csv").samples] == ["a/1", "b/1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "no predictions.csv: its columns are a, b"),
        ("image,patient,magnification,true,predicted,p_x\ni,1,40,y,x,1\n", "line 2"),
        ("image,patient,magnification,true,predicted,p_x,p_y\ni,1,40,y,x,1\n", "1 probabilities of 2 classes"),
    ],
)
def test_another_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Predictions.read_csv(tmp_path / "t.csv")
