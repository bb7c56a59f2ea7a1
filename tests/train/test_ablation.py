"""The grid of a study, its cells in turn, and what is made of their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernet_fast.train.ablation import (
    Cell,
    CellResult,
    cell_folder,
    check_same_study,
    collect,
    complete_blocks,
    factors,
    grid,
    mean_and_deviation,
    run_cells,
)  # fmt: skip
from ernet_fast.train.ablation_summary import summarise

FAKE = ("er_resnet18", "resnet18"), ("macenko", "none"), (0, 1, 2), (0,)


def figures(accuracy: float | None) -> dict:
    return {
        "overall": {"images": 10, "accuracy": accuracy, "f1": 0.4, "mcc": 0.0, "auc": 0.5},
        "patients": 4, "epoch": 1, "loss": 0.7,
        "by_patient": {"overall": {"patient_recognition_rate": 0.25, "patient_auc": None}},
        "validation": {"auc": 0.6}, "by_magnification": {},
    }  # fmt: skip


def result(cell: Cell, accuracy: float | None) -> CellResult:
    return CellResult(cell, figures(accuracy))


def test_the_grid_goes_block_by_block():
    cells = grid(["a", "b"], ["none"], [0, 1], [5, 6])
    assert cells[:3] == [Cell("a", "none", 0, 5), Cell("b", "none", 0, 5), Cell("a", "none", 1, 5)]
    assert len(cells) == len(set(cells)) == 8 and cells[0].name == "a-none-fold0-seed5"
    for bad in (([], ["none"]), (["a", "a"], ["none"])):
        with pytest.raises(ValueError, match="models="):
            grid(*bad, [0], [0])


class Runs:
    """Stands for training and evaluation; some cells fail, or are stopped by a signal."""

    def __init__(self, failing=(), stopping=()):
        self.calls, self.failing, self.stopping = [], failing, stopping

    def train(self, cell, folder, resume):
        self.calls.append((cell.name, resume))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last.pt").touch()
        if cell in self.failing:
            raise ValueError("no stains")
        return 75 if cell in self.stopping else 0

    def judge(self, cell, folder, into: Path):
        assert (folder / "last.pt").is_file()
        into.mkdir()
        (into / "metrics.json").write_text(json.dumps(figures(0.5)))


def test_every_cell_is_done_once_and_failures_do_not_stop_the_others(tmp_path, quiet):
    cells = grid(*FAKE)
    runs = Runs(failing=cells[:1])
    found = run_cells(tmp_path, cells[:5], runs.train, runs.judge, str, quiet)
    assert (found.found, found.trained, found.stopped) == (0, 4, 0) and found.failed == ((cells[0], "no stains"),)
    assert not (cell_folder(tmp_path, cells[0]) / "evaluation").exists()
    again = Runs()
    found = run_cells(tmp_path, cells, again.train, again.judge, str, quiet)
    assert (found.found, found.trained) == (4, 8)
    assert again.calls[0] == (cells[0].name, True) and again.calls[1] == (cells[5].name, False)
    assert [r.cell for r in collect(tmp_path, cells)] == cells


def test_a_stopped_run_stops_the_study(tmp_path, quiet):
    cells = grid(*FAKE)
    runs = Runs(stopping=cells[1:2])
    found = run_cells(tmp_path, cells, runs.train, runs.judge, str, quiet)
    assert found.stopped == 75 and found.trained == 1 and len(runs.calls) == 2
    assert [r.cell for r in collect(tmp_path, cells)] == cells[:1]


def test_cells_of_other_images_are_no_study(tmp_path, quiet):
    cells = grid(*FAKE)[:2]
    runs = Runs()
    run_cells(tmp_path, cells, runs.train, runs.judge, str, quiet)
    other = figures(0.5) | {"patients": 5}
    (cell_folder(tmp_path, cells[1]) / "evaluation" / "metrics.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"different images: \[\(10, 4\), \(10, 5\)\]"):
        collect(tmp_path, cells)


def test_the_settings_of_a_study_stay(tmp_path):
    check_same_study(tmp_path / "s", {"epochs": 2, "magnifications": (40, 100)})
    check_same_study(tmp_path / "s", {"epochs": 2, "magnifications": (40, 100)})
    with pytest.raises(ValueError, match="epochs was 2, now 3, magnifications was"):
        check_same_study(tmp_path / "s", {"epochs": 3})


def test_factors_are_means_over_the_other_one_by_block():
    values = {("er_resnet18", "none"): 0.4, ("er_resnet18", "macenko"): 0.8, ("resnet18", "none"): 0.2,
              ("resnet18", "macenko"): 0.4}  # fmt: skip
    found = factors([values, {key: value + 0.1 for key, value in values.items()}])
    assert found["network"] == {"er_resnet18": pytest.approx([0.6, 0.7]), "resnet18": pytest.approx([0.3, 0.4])}
    assert found["preprocessing"] == {"none": pytest.approx([0.3, 0.4]), "macenko": pytest.approx([0.6, 0.7])}
    assert found["combination"]["er_resnet18, macenko"] == pytest.approx([0.8, 0.9])
    one = {key: value for key, value in values.items() if key[0] == "resnet18"}
    assert list(factors([one, one])) == ["preprocessing"] and factors([]) == {}


def test_only_complete_blocks_are_tested():
    pytest.importorskip("scipy")
    cells = grid(*FAKE)
    accuracy = {cell: 0.5 + 0.2 * (cell.stain == "macenko") + 0.01 * cell.fold for cell in cells}
    accuracy[cells[0]] += 0.003  # else there is no error at all
    results = [result(cell, accuracy[cell]) for cell in cells]
    assert len(complete_blocks(results, "accuracy")) == 3
    assert len(complete_blocks(results[:-1], "accuracy")) == 2
    assert complete_blocks([result(cell, None) for cell in cells], "accuracy") == []
    summary = summarise(results[:-1], len(cells), "accuracy")
    assert set(summary.tests) == {"network", "preprocessing", "combination"}
    assert summary.tests["preprocessing"].blocks == 2
    letters = {tuple(row[:2]): row[3] for row in summary.treatments_table().rows}
    assert letters["er_resnet18", "macenko"] == letters["resnet18", "macenko"] == "a"
    assert letters["er_resnet18", "none"] == letters["resnet18", "none"] == "b"
    assert summarise(results[:4], len(cells), "accuracy").tests == {}, "one block is no sample"
    with pytest.raises(ValueError, match="figure='speed'"):
        summarise(results, 12, "speed")


def test_times_and_runs_are_shown():
    cells = grid(*FAKE)[:3]
    seconds = [(9.0, 1.0, 2.0), (3.0, 5.0), ()]
    results = [CellResult(c, figures(0.5 + 0.1 * k), s) for k, (c, s) in enumerate(zip(cells, seconds, strict=True))]
    summary = summarise(results, 12, "accuracy")
    assert [row[:2] for row in summary.time_table().rows] == [["er_resnet18", "macenko"], ["er_resnet18", "none"]]
    assert [row[2:] for row in summary.time_table().rows] == [["3", "1.0", "2.0", "2.0 to 2.0"],
                                                              ["2", "1.0", "4.0", "4.0 to 4.0"]]  # fmt: skip
    shown = summary.runs_table()
    assert shown.header[2:] == ["fold 0, seed 0"] and [row[2] for row in shown.rows] == ["0.500", "0.600", "0.700"]


def test_means_are_of_what_is_defined():
    assert mean_and_deviation([1.0, None, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None) and mean_and_deviation([None]) == (None, None)
