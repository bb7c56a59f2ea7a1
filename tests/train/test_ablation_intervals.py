"""Intervals of a study: those of two runs by `compare`, and of blocks by hand; which runs are held against which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ernet_fast.data import Sample
from ernet_fast.train import Bootstrap, Predictions, compare, compute_metrics, patient_metrics
from ernet_fast.train.ablation import Cell, grid
from ernet_fast.train.ablation_intervals import ALL, Contrast, StudyDraws, contrasts

DRAWS = Bootstrap(400, seed=2)
CELLS = grid(["resnet18", "er_resnet18"], ["none", "macenko"], [0, 1, 2], [0])
PLAIN, ER = [[c for c in CELLS if c.model == model and c.stain == "none"] for model in ("resnet18", "er_resnet18")]


def make(skill: float, seed: int, patients: int = 12, images: int = 10) -> Predictions:
    """Patients have a difficulty of their own, the same for every seed; `skill` moves scores apart."""
    difficulty = np.random.default_rng(0).normal(size=patients).repeat(images)
    truth = (np.arange(patients) % 2).repeat(images)
    noise = np.random.default_rng(seed).normal(size=patients * images)
    score = 1 / (1 + np.exp(-(skill + difficulty) * (2 * truth - 1) - noise))
    return of_scores(score, truth, images)


def of_scores(score, truth, images: int) -> Predictions:
    samples = tuple(
        Sample(Path(f"{i:03}.png"), int(k), "A", "s", f"{i // images:02}", (40, 100)[i % 2], "1")
        for i, k in enumerate(truth)
    )
    return Predictions(torch.from_numpy(np.stack([1 - score, score], axis=1)), samples, ("benign", "malignant"))


@pytest.fixture(scope="module")
def runs() -> dict[Cell, Predictions]:
    return {cell: make(0.5 + 0.4 * (cell in ER), seed) for seed, cell in enumerate([*PLAIN, *ER])}


@pytest.fixture(scope="module")
def study(runs) -> StudyDraws:
    draws = StudyDraws(DRAWS)
    for cell, predictions in runs.items():
        draws.add(cell, predictions)
    return draws


def test_one_pair_is_compare(runs, study):
    pair = PLAIN[0], ER[0]
    expected = compare(runs[pair[0]], runs[pair[1]], DRAWS)
    for part, differences in {ALL: expected.overall, **expected.by_magnification}.items():
        for found in differences:
            estimate = study.difference(part, found.figure, Contrast("", (pair,)))
            assert estimate.value == pytest.approx(found.difference, abs=1e-12), found.figure
            assert estimate.over_patients == pytest.approx(found.interval), found.figure
            assert estimate.over_both is None, "one block says nothing of others"


def test_means_are_those_of_the_runs(runs, study):
    assert study.patients == {part: {"benign": 6, "malignant": 6} for part in (ALL, "40X", "100X")}
    for part in (ALL, "40X"):
        one = [runs[cell] if part == ALL else runs[cell].by_magnification()[part] for cell in PLAIN]
        for figure, of in (("auc", compute_metrics), ("mcc", compute_metrics), ("patient_auc", patient_metrics)):
            estimate, values = study.mean(part, figure, PLAIN), [of(predictions)[figure] for predictions in one]
            assert estimate.blocks == pytest.approx(values) and estimate.value == pytest.approx(np.mean(values))
            assert estimate.over_patients[0] <= estimate.value <= estimate.over_patients[1]


def test_differences_are_paired_within_blocks(study):
    contrast = Contrast("", tuple(zip(PLAIN, ER, strict=True)))
    found, first, second = study.difference(ALL, "loss", contrast), *(study.mean(ALL, "loss", c) for c in (PLAIN, ER))
    assert found.blocks == pytest.approx(np.subtract(second.blocks, first.blocks))
    width = [bounds[1] - bounds[0] for bounds in (found.over_patients, first.over_patients, second.over_patients)]
    assert width[0] < 0.6 * min(width[1:]), "what makes a patient hard for both falls out"
    assert found.over_both[1] - found.over_both[0] > width[0]


def test_over_patients_and_blocks_by_hand():
    """Every patient has the accuracy of its run: patients move nothing, and what is left is drawing of blocks."""
    draws, right = StudyDraws(DRAWS), (2, 5, 9)
    truth = (np.arange(8) % 2).repeat(10)
    for cell, count in zip(PLAIN, right, strict=True):
        good = np.arange(80) % 10 < count
        draws.add(cell, of_scores(np.where(good == (truth == 1), 0.9, 0.1), truth, 10))
    found = draws.mean(ALL, "accuracy", PLAIN)
    assert found.over_patients == pytest.approx([found.value] * 2) and found.value == pytest.approx(sum(right) / 30)
    chosen = np.random.default_rng(DRAWS.seed + 1).multinomial(3, [1 / 3] * 3, DRAWS.resamples)
    assert found.over_both == pytest.approx(np.quantile(chosen @ right / 30, [0.025, 0.975]))


def test_what_is_undefined_is_left_out():
    draws, truth = StudyDraws(DRAWS), np.array([0, 1] * 6).repeat(10)
    draws.add(PLAIN[0], of_scores(np.full(120, 0.1), truth, 10))
    draws.add(PLAIN[1], of_scores(np.where(truth == 1, 0.9, 0.2), truth, 10))
    assert draws.mean(ALL, "precision", PLAIN[:1]) == (None, None, None, ())
    assert draws.mean(ALL, "precision", PLAIN[:2]).blocks == (1.0,)
    assert draws.difference(ALL, "precision", Contrast("", ((PLAIN[0], PLAIN[1]),))).value is None
    one = StudyDraws(DRAWS)
    one.add(PLAIN[0], of_scores(np.full(10, 0.9), np.ones(10), 10))
    assert one.mean(ALL, "accuracy", PLAIN[:1]) == (1.0, None, None, (1.0,)), "one patient says nothing of others"


def test_runs_on_other_images_are_refused(runs, study):
    other = runs[PLAIN[0]].subset(lambda sample: sample.patient != "03")
    with pytest.raises(ValueError, match="10 only in the first"):
        study.add(CELLS[-1], other)


def test_contrasts_differ_in_one_thing():
    found = {contrast.name: contrast.pairs for contrast in contrasts(CELLS)}
    assert list(found) == [
        "er_resnet18 - resnet18, all stains", "er_resnet18 - resnet18, none", "er_resnet18 - resnet18, macenko",
        "macenko - none, all networks", "macenko - none, resnet18", "macenko - none, er_resnet18",
    ]  # fmt: skip
    assert len(found["er_resnet18 - resnet18, all stains"]) == 6
    assert found["er_resnet18 - resnet18, none"] == tuple(zip(PLAIN, ER, strict=True))
    for first, second in found["macenko - none, resnet18"]:
        assert second == first._replace(stain="macenko") and first.model == "resnet18"


def test_contrasts_of_what_is_finished():
    last = CELLS[-1]
    found = {contrast.name: contrast.pairs for contrast in contrasts(CELLS[:-1])}
    assert last == Cell("er_resnet18", "macenko", 2, 0)
    assert {pair[1].block for pair in found["er_resnet18 - resnet18, all stains"]} == {(0, 0), (1, 0)}, "whole blocks"
    assert len(found["er_resnet18 - resnet18, none"]) == 3 and len(found["er_resnet18 - resnet18, macenko"]) == 2
    assert contrasts([cell for cell in CELLS if cell.model == "resnet18" and cell.stain == "none"]) == []
    one = contrasts([cell for cell in CELLS if cell.stain == "macenko"])
    assert [contrast.name for contrast in one] == ["er_resnet18 - resnet18, macenko"]
