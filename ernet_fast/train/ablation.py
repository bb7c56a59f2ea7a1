"""A study of networks and stain normalisation: one run for each cell of a grid, on one split, resumable and shardable.

OUT/study.json                      settings that all cells share
OUT/split.csv                       the split that all cells share
OUT/cells/NAME/                     the run of a cell
OUT/cells/NAME/evaluation/          its predictions.csv and, once it is finished, metrics.json
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ernet_fast.console.atomic_file import write_csv, write_json_first
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_figure
from ernet_fast.train.bootstrap import FIGURES
from ernet_fast.train.run_folder import HISTORY, LAST

SPLIT = "split.csv"
_STUDY = "study.json"
SHORTCUTS = {"plain": "resnet", "er": "er_resnet"}
"""Kind of shortcut -> beginning of the names of its networks."""


class Cell(NamedTuple):
    """One run of a study."""

    model: str
    stain: str
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.model}-{self.stain}-fold{self.fold}-seed{self.seed}"

    @property
    def block(self) -> tuple[int, int]:
        """What cells of all networks and stains share."""
        return self.fold, self.seed


class CellResult(NamedTuple):
    """A finished cell, the `Evaluation.figures()` of it, and the seconds that each epoch trained."""

    cell: Cell
    figures: dict[str, Any]
    epoch_seconds: tuple[float, ...] = ()

    def figure(self, name: str) -> float | None:
        """A figure of `FIGURES` over all images."""
        if name == "loss":
            return self.figures["loss"]
        group = self.figures["by_patient"]["overall"] if name.startswith("patient_") else self.figures["overall"]
        return group[name]


@dataclass(frozen=True)
class Outcome:
    """What became of the cells of a call: how many were found finished and trained, those that failed and why, and the
    exit code of a run that a signal stopped, with which the call ended; 0 if none was.
    """

    found: int
    trained: int
    failed: tuple[tuple[Cell, str], ...]
    stopped: int = 0


def grid(models: Sequence[str], stains: Sequence[str], folds: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells, block by block: a study that is stopped has whole blocks, which the range test needs."""
    for name, values in {"models": models, "stains": stains, "folds": folds, "seeds": seeds}.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name}={list(values)}; expected at least one, each once.")
    blocks = itertools.product(seeds, folds)
    return [Cell(m, s, fold, seed) for seed, fold in blocks for m, s in itertools.product(models, stains)]


def cell_folder(out: Path, cell: Cell) -> Path:
    """Where a cell's run lies."""
    return out / "cells" / cell.name


def evaluation_folder(out: Path, cell: Cell) -> Path:
    """Where a cell's evaluation lies."""
    return cell_folder(out, cell) / "evaluation"


def _result_file(out: Path, cell: Cell) -> Path:
    return evaluation_folder(out, cell) / "metrics.json"


def check_same_study(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings that all cells share in `out`, or raise ValueError if it holds a study with others."""
    out.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(settings))
    if write_json_first(out / _STUDY, {"settings": plain}):
        return
    saved = json.loads((out / _STUDY).read_text(encoding="utf-8"))["settings"]
    changed = [name for name in {**saved, **plain} if saved.get(name) != plain.get(name)]
    if changed:
        listed = ", ".join(f"{name} was {saved.get(name)!r}, now {plain.get(name)!r}" for name in changed)
        raise ValueError(f"the study in {str(out)!r} was begun with other settings: {listed}. Choose another --out.")


def run_cells(
    out: Path,
    cells: Sequence[Cell],
    train: Callable[[Cell, Path, bool], int],
    judge: Callable[[Cell, Path, Path], Any],
    describe: Callable[[Exception], str],
    reporter: Reporter,
) -> Outcome:
    """Train and evaluate the cells that are not finished; a cell that fails does not keep the others from running.

    Args:
        out: folder of the study.
        cells: the cells of this call (one shard's).
        train: trains a cell into a folder, continuing the run in it if the last argument is true; returns 0, or an
            exit code if it was stopped behind a checkpoint, which ends the call.
        judge: evaluates the run in the first folder, and writes metrics.json into the second.
        describe: an error as one sentence.
        reporter: gets a line for each cell.
    """
    found, trained = 0, 0
    failed: list[tuple[Cell, str]] = []
    for number, cell in enumerate(cells, 1):
        folder, result = cell_folder(out, cell), _result_file(out, cell)
        where = f"cell {number}/{len(cells)} {cell.name}"
        if result.is_file():
            found += 1
            continue
        resume = (folder / LAST).is_file()
        reporter.line(f"{where}{' (resumed)' if resume else ''}")
        start = time.perf_counter()
        try:
            code = train(cell, folder, resume)
            if code:
                return Outcome(found, trained, tuple(failed), code)
            judge(cell, folder, result.parent)
        except Exception as error:
            failed.append((cell, describe(error)))
            reporter.warning(f"{where} failed: {failed[-1][1]}")
            continue
        trained += 1
        read = _read(out, cell)
        figures = ", ".join(f"{name} {format_figure(read.figure(name))}" for name in ("accuracy", "auc"))
        reporter.line(f"{where}: {figures}, {time.perf_counter() - start:.0f} s")
    return Outcome(found, trained, tuple(failed))


def _read(out: Path, cell: Cell) -> CellResult:
    figures = json.loads(_result_file(out, cell).read_text(encoding="utf-8"))
    history = cell_folder(out, cell) / HISTORY
    records = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else []
    return CellResult(cell, figures, tuple(record["train_seconds"] for record in records))


def collect(out: Path, cells: Sequence[Cell]) -> list[CellResult]:
    """The finished ones of `cells`, whoever finished them.

    Raises ValueError if they were not evaluated on the same number of images and patients.
    """
    found = [_read(out, cell) for cell in cells if _result_file(out, cell).is_file()]
    sizes = {(r.figures["overall"]["images"], r.figures["patients"]) for r in found}
    if len(sizes) > 1:
        raise ValueError(f"cells of {str(out)!r} are of different images: {sorted(sizes)} (images, patients).")
    return found


def write_table(path: Path, results: Sequence[CellResult]) -> None:
    """One line a cell: network, stain, fold, seed, epoch, and every figure; undefined ones are empty.

    `seconds_per_epoch` is the median of the seconds that an epoch trained.
    """
    header = ["model", "stain", "fold", "seed", "epoch", "images", "patients", *FIGURES, "validation_auc"]
    header += ["epochs", "seconds_per_epoch"]
    rows = [header]
    for result in results:
        overall, validation = result.figures["overall"], result.figures["validation"] or {}
        size = [result.figures["epoch"], overall["images"], result.figures["patients"]]
        figures = [result.figure(name) for name in FIGURES]
        seconds = result.epoch_seconds
        spent = [len(seconds), median(seconds) if seconds else None]
        rows.append([*result.cell, *size, *figures, validation.get("auc"), *spent])  # type: ignore[list-item]
    write_csv(path, rows)


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Of the values that are defined; the deviation, of samples, of at least two."""
    there = [value for value in values if value is not None]
    if not there:
        return None, None
    mean = math.fsum(there) / len(there)
    if len(there) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in there) / (len(there) - 1))


def by_treatment(results: Sequence[CellResult]) -> dict[tuple[str, str], list[CellResult]]:
    """Results of each network and stain."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.cell.model, result.cell.stain), []).append(result)
    return groups


def complete_blocks(results: Sequence[CellResult], figure: str) -> list[dict[tuple[str, str], float]]:
    """Values of `figure` by treatment, of the blocks in which every treatment is finished and has that figure."""
    treatments = list(by_treatment(results))
    blocks: dict[tuple[int, int], dict[tuple[str, str], float]] = {}
    for result in results:
        value = result.figure(figure)
        if value is not None:
            blocks.setdefault(result.cell.block, {})[result.cell.model, result.cell.stain] = value
    return [block for block in blocks.values() if len(block) == len(treatments)]


def factors(blocks: Sequence[dict[tuple[str, str], float]]) -> dict[str, dict[str, list[float]]]:
    """What the range test compares, by block: networks (each the mean over the stains), stains (over the networks), and
    both together. A factor of one level is left out.
    """
    if not blocks:
        return {}
    treatments = list(blocks[0])
    levels: dict[str, dict[str, list[tuple[str, str]]]] = {"network": {}, "preprocessing": {}, "combination": {}}
    for model, stain in treatments:
        for factor, level in (("network", model), ("preprocessing", stain), ("combination", f"{model}, {stain}")):
            levels[factor].setdefault(level, []).append((model, stain))
    values = {
        factor: {level: [math.fsum(block[t] for t in of) / len(of) for block in blocks] for level, of in found.items()}
        for factor, found in levels.items()
        if len(found) > 1
    }
    if len(values) < 3:
        values.pop("combination", None)  # the same as the one factor
    return values
