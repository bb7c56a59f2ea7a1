"""Two runs on the same images: paired differences, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import Sample
from ernet_fast.train import Bootstrap, Predictions, compare, compute_metrics, patient_metrics
from ernet_fast.train.bootstrap import FIGURES

DRAWS = Bootstrap(500, seed=2)


def make(skill: float, seed: int, patients: int = 16, images: int = 20) -> Predictions:
    """Patients have a difficulty of their own, the same for every seed; `skill` moves scores apart."""
    difficulty = np.random.default_rng(0).normal(size=patients).repeat(images)
    truth = (np.arange(patients) % 2).repeat(images)
    noise = np.random.default_rng(seed).normal(size=patients * images)
    score = 1 / (1 + np.exp(-(skill + difficulty) * (2 * truth - 1) - noise))
    samples = tuple(
        Sample(Path(f"{i:03}.png"), int(k), "A", "s", f"{i // images:02}", (40, 100)[i % 2], "1")
        for i, k in enumerate(truth)
    )
    return Predictions(torch.from_numpy(np.stack([1 - score, score], axis=1)), samples, ("benign", "malignant"))


def by_name(found):
    return {difference.figure: difference for difference in found}


def test_figures_and_differences_are_those_of_the_runs():
    first, second = make(0.5, 1), make(1.5, 2)
    found = compare(first, second, DRAWS)
    assert (found.images, found.patients) == (320, 16) and set(found.by_magnification) == {"40X", "100X"}
    for part, one, two in [
        (found.overall, first, second),
        (found.by_magnification["40X"], first.by_magnification()["40X"], second.by_magnification()["40X"]),
    ]:
        figures = [{**compute_metrics(p), **patient_metrics(p), "loss": p.loss()} for p in (one, two)]
        assert [difference.figure for difference in part] == list(FIGURES)
        for difference in part:
            values = figures[0][difference.figure], figures[1][difference.figure]
            assert (difference.first, difference.second) == pytest.approx(values)
            assert difference.difference == pytest.approx(values[1] - values[0])
            assert difference.interval[0] <= difference.difference <= difference.interval[1]
    better = by_name(found.overall)["auc"]
    assert better.difference > 0 and better.interval[0] > 0 and better.p_value < 0.05


def test_a_run_does_not_differ_from_itself():
    for difference in compare(make(1, 1), make(1, 1), DRAWS).overall:
        assert difference.difference == 0 and difference.interval == [0, 0] and difference.p_value == 1


def test_pairing_tells_what_single_intervals_cannot():
    """A small improvement of every patient, far below what patients differ by."""
    first = make(1, 1)
    logits = first.probabilities.log()
    sign = 2.0 * first.targets - 1
    logits[:, 1] += 0.15 * sign
    second = Predictions(logits.softmax(dim=1), first.samples, first.classes)
    found = by_name(compare(first, second, DRAWS).overall)["loss"]
    from ernet_fast.train.bootstrap import intervals

    low, high = intervals(first, DRAWS)["loss"]
    assert high - low > 5 * (found.interval[1] - found.interval[0])
    assert found.interval[1] < 0 and found.p_value == pytest.approx(1 / 501)


def test_the_other_way_round_is_the_opposite():
    first, second = make(0.8, 1), make(1.0, 2)
    there, back = by_name(compare(first, second, DRAWS).overall), by_name(compare(second, first, DRAWS).overall)
    for name in FIGURES:
        assert there[name].difference == -back[name].difference and there[name].p_value == back[name].p_value
        assert there[name].interval == pytest.approx([-x for x in reversed(back[name].interval)])


def test_p_values_without_a_difference_are_even():
    """Two networks of equal skill: small p-values are as rare as they should be."""
    pairs = [[make(1, 2 * k + n, images=8).by_magnification()["40X"] for n in (0, 1)] for k in range(40)]
    found = [by_name(compare(*pair, Bootstrap(100)).overall) for pair in pairs]
    rejected = np.mean([part["auc"].p_value < 0.1 for part in found])
    assert 0 <= rejected < 0.29  # expected 0.1; 40 trials, binomial: four standard deviations above


def test_with_few_patients_all_exchanges_are_looked_at():
    """Four patients: of 16 exchanges, each made by hand."""
    first, second = make(0.5, 1, patients=4), make(1.5, 2, patients=4)
    found = by_name(compare(first, second, DRAWS).overall)
    names = ["00", "01", "02", "03"]
    rows = [names.index(sample.patient) for sample in first.samples]
    differences = []
    for choice in itertools.product([False, True], repeat=4):
        moved = torch.tensor(choice)[rows][:, None]
        pair = [(first, second), (second, first)]
        mixed = [torch.where(moved, other.probabilities, one.probabilities) for one, other in pair]
        made = [Predictions(table, first.samples, first.classes) for table in mixed]
        differences.append([compute_metrics(p)["auc"] for p in made] + [p.loss() for p in made])
    table = np.array(differences)
    for name, d in (("auc", table[:, 1] - table[:, 0]), ("loss", table[:, 3] - table[:, 2])):
        assert found[name].p_value == pytest.approx(np.mean(np.abs(d) >= abs(d[0]) - 1e-9)), name


def test_the_order_of_the_images_does_not_matter():
    first, second = make(1, 1), make(1, 2)
    order = torch.randperm(len(second), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = Predictions(second.probabilities[order], tuple(second.samples[i] for i in order), second.classes)
    assert compare(first, mixed, DRAWS).overall == compare(first, second, DRAWS).overall


def test_differing_settings_are_named():
    settings = {"model": "er_resnet18", "seed": 0}, {"model": "resnet18", "seed": 0, "ema": 0.9}
    found = compare(make(1, 1), make(1, 2), DRAWS, settings=settings)
    assert found.settings == {"model": ("er_resnet18", "resnet18"), "ema": (None, 0.9)}
    assert found.to_dict()["settings"]["model"] == ["er_resnet18", "resnet18"]


def test_other_images_are_refused():
    first = make(1, 1)
    without = first.subset(lambda sample: sample.name not in ("003", "010"))
    with pytest.raises(ValueError, match=r"not of the same images: 2 only in the first \(e\.g\. 003, 010\)"):
        compare(first, without, DRAWS)
    with pytest.raises(ValueError, match="2 only in the second"):
        compare(without, first, DRAWS)
    moved = (first.samples[0]._replace(patient="99"), *first.samples[1:])
    with pytest.raises(ValueError, match="000 is class benign, patient 00, 40X in the first run, and benign, 99, 40X"):
        compare(first, Predictions(first.probabilities, moved, first.classes), DRAWS)
    with pytest.raises(ValueError, match="classes"):
        compare(first, Predictions(first.probabilities, first.samples, ("a", "b")), DRAWS)
    twice = (first.samples[1], *first.samples[1:])
    with pytest.raises(ValueError, match="only in the first|twice"):
        compare(first, Predictions(first.probabilities, twice, first.classes), DRAWS)
