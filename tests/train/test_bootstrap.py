"""Intervals: resampling by weights is resampling of images; patients are drawn whole; coverage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import Sample
from ernet_fast.train import Bootstrap, Predictions, compute_metrics, patient_metrics
from ernet_fast.train.bootstrap import FIGURES, PatientSums, all_intervals, intervals, roc_band

ROUNDING = 1e-12  # of sums of 150 float64 terms below 10


def make(classes: int = 2, patients: int = 9, seed: int = 0, images: int = 150) -> Predictions:
    """Images of patients of one class each, as in the data set; some scores are equal."""
    generator = np.random.default_rng(seed)
    owner = generator.integers(0, patients, images)
    truth = owner % classes
    logits = (generator.normal(size=(images, classes)) + 1.5 * np.eye(classes)[truth]).round(1)
    samples = tuple(
        Sample(Path(f"{i}.png"), int(label), "A", "s", f"{who:03}", (40, 100)[i % 2], "001")
        for i, (label, who) in enumerate(zip(truth, owner, strict=True))
    )
    return Predictions(torch.from_numpy(logits).softmax(dim=1), samples, tuple("abcd"[:classes]))


def drawn(predictions: Predictions, counts: list[int]) -> Predictions:
    """The images of each patient as often as it was drawn, each time as another patient."""
    names = sorted({sample.patient for sample in predictions.samples})
    rows, samples = [], []
    for name, count in zip(names, counts, strict=True):
        for copy in range(count):
            for row, sample in enumerate(predictions.samples):
                if sample.patient == name:
                    rows.append(row)
                    samples.append(sample._replace(patient=f"{name}-{copy}"))
    return Predictions(predictions.probabilities[rows], tuple(samples), predictions.classes)


@pytest.mark.parametrize("classes", [2, 3])
def test_weights_are_images_drawn_again(classes):
    made = make(classes)
    weights = Bootstrap(100, seed=3).weights(9)[:6]
    weights[0] = 1
    weights[1] = torch.tensor([2.0, 0, 1] * 3)  # one class is missing: undefined, or over fewer classes
    found = PatientSums(made).figures(weights)
    for row, counts in enumerate(weights.int().tolist()):
        again = drawn(made, counts)
        expected = {**compute_metrics(again), **patient_metrics(again), "loss": again.loss()}
        for name in FIGURES:
            value = float(found[name][row])
            shown = None if math.isnan(value) else value
            assert shown == pytest.approx(expected[name], abs=ROUNDING), (name, counts)


def test_a_draw_is_of_as_many_patients_and_repeatable():
    weights = Bootstrap(500, seed=1).weights(7)
    assert weights.shape == (500, 7) and (weights.sum(dim=1) == 7).all()
    assert torch.equal(weights, Bootstrap(500, seed=1).weights(7))
    assert not torch.equal(weights, Bootstrap(500, seed=2).weights(7))
    assert weights.mean(dim=0).tolist() == pytest.approx([1.0] * 7, abs=0.2)


def test_intervals_hold_the_figure_and_name_their_settings():
    made = make()
    found = all_intervals(made, Bootstrap(300, seed=4))
    assert (found["level"], found["resamples"], found["seed"], found["over"]) == (0.95, 300, 4, "patients")
    assert set(found["by_magnification"]) == {"40X", "100X"} and set(found["overall"]) == set(FIGURES)
    figures = {**compute_metrics(made), **patient_metrics(made), "loss": made.loss()}
    for name in ("accuracy", "auc", "mcc", "loss", "patient_recognition_rate", "patient_auc"):
        low, high = found["overall"][name]
        assert low <= figures[name] <= high and (low < high or low == 1), name
    wider = intervals(made, Bootstrap(300, level=0.99, seed=4))
    assert wider["accuracy"][0] < found["overall"]["accuracy"][0]


def test_what_is_undefined_has_no_interval():
    made = make(patients=9)
    one = made.subset(lambda sample: sample.patient == "001")
    assert intervals(one, Bootstrap(100)) == dict.fromkeys(FIGURES), "one patient says nothing about others"
    benign = intervals(made.subset(lambda sample: sample.label == 0), Bootstrap(100))
    assert benign["auc"] is None and benign["recall"] is None and benign["accuracy"] is not None
    nothing = Predictions(torch.empty(0, 2, dtype=torch.float64), (), ("a", "b"))
    assert intervals(nothing, Bootstrap(100)) == dict.fromkeys(FIGURES)
    rare = made.subset(lambda sample: sample.label == 0 or sample.patient == "001")
    assert intervals(rare, Bootstrap(400))["auc"] is None, "more than a tenth of the draws lack the class"


def test_images_of_a_patient_are_not_independent():
    """Patients that are right or wrong as a whole: the interval is as wide as that of as many images."""
    truth = np.repeat(np.arange(20) % 2, 30)
    right = np.repeat(np.arange(20) % 4 != 3, 30)
    score = np.where(right == (truth == 1), 0.8, 0.2)
    samples = tuple(Sample(Path(f"{i}.png"), int(k), "A", "s", f"{i // 30:02}", 40, "1") for i, k in enumerate(truth))
    made = Predictions(torch.from_numpy(np.stack([1 - score, score], axis=1)), samples, ("a", "b"))
    low, high = intervals(made, Bootstrap(4000))["accuracy"]
    spread = 2 * 1.96 * math.sqrt(0.75 * 0.25 / 20)  # normal approximation of 20 patients; of 600 images a fifth of it
    assert high - low == pytest.approx(spread, rel=0.15)


def test_the_roc_band_holds_the_curve():
    made = make(images=300, patients=12)
    rates = np.linspace(0, 1, 11)
    low, high = roc_band(made, Bootstrap(200), rates)
    assert (low <= high).all() and (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all() and high[-1] == 1
    sklearn = pytest.importorskip("sklearn.metrics")
    x, y, _ = sklearn.roc_curve(made.targets.numpy(), made.probabilities[:, 1].numpy(), drop_intermediate=False)
    curve = np.interp(rates, x, y)
    assert (low <= curve + 1e-9).all() and (curve <= high + 1e-9).all()
    nothing = Predictions(torch.empty(0, 2, dtype=torch.float64), (), ("a", "b"))
    assert roc_band(nothing, Bootstrap(100), rates) is None
    assert roc_band(made.subset(lambda sample: sample.label == 1), Bootstrap(100), rates) is None


@pytest.mark.parametrize("patients", [16, 3], ids=["all-classes", "a-class-is-missing-in-many-draws"])
def test_of_many_classes_the_band_is_of_their_mean(patients):
    """Against curves of scikit-learn, of images drawn again: the mean over the classes that a draw holds."""
    sklearn = pytest.importorskip("sklearn.metrics")
    made, rates, bootstrap = make(4, patients=patients, images=200), np.linspace(0, 1, 11), Bootstrap(100, seed=5)
    curves = []
    for counts in bootstrap.weights(patients).int().tolist():
        again, found = drawn(made, counts), []
        for k in range(4):
            truth = (again.targets == k).numpy()
            if 0 < truth.sum() < len(truth):
                x, y, _ = sklearn.roc_curve(truth, again.probabilities[:, k].numpy(), drop_intermediate=False)
                found.append(np.interp(rates, x, y))
        curves += [np.mean(found, axis=0)] if found else []
    band = roc_band(made, bootstrap, rates)
    if len(curves) < 90:
        assert band is None
    else:
        np.testing.assert_allclose(band, np.quantile(curves, [0.025, 0.975], axis=0), atol=1e-9)


@pytest.mark.parametrize("bad", [{"resamples": 50}, {"resamples": 1e3}, {"level": 1.0}, {"level": 0.2}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Bootstrap(**bad)
