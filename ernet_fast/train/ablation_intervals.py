"""What a study says of other patients and other trainings: intervals of means over runs, and of paired differences.

All runs of a study are tested on the same images, so one draw of patients serves them all, and what makes a patient
hard for every network falls out of a difference. There are two intervals: over patients, of the networks as they were
trained; and over patients and blocks, where blocks (fold and seed) are drawn as well, independently (the pigeonhole
bootstrap, Owen, Ann. Appl. Stat. 1, 2007), which is rather too wide than too narrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ernet_fast.console.progress import Reporter
from ernet_fast.train.ablation import SHORTCUTS, Cell, evaluation_folder
from ernet_fast.train.bootstrap import Bootstrap, PatientSums
from ernet_fast.train.comparison import in_order_of, read_predictions
from ernet_fast.train.predictions import Predictions

ALL = "all"
"""The part of the test images that is all of them; the others are magnifications."""

_PLURALS = {"model": "networks", "stain": "stains"}


class Estimate(NamedTuple):
    """The mean of a figure, or of its differences, over blocks; None: undefined."""

    value: float | None
    over_patients: list[float] | None
    over_both: list[float] | None  # patients and blocks
    blocks: tuple[float, ...]


class Contrast(NamedTuple):
    """Runs that differ in one thing alone: of each pair the second minus the first, as `name` says."""

    name: str
    pairs: tuple[tuple[Cell, Cell], ...]


class StudyDraws:
    """Every figure of every run, for the same draws of the test patients.

    Args:
        bootstrap: how patients, and blocks, are drawn.
    """

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.bootstrap = bootstrap
        self.patients: dict[str, dict[str, int]] = {}  # of each part: how many of each class
        self._first: Predictions | None = None
        self._figures: dict[
            tuple[str, Cell], dict[str, Tensor]
        ] = {}  # [1 + resamples], first of the images as they are

    def add(self, cell: Cell, predictions: Predictions) -> None:
        """Take a run's predictions; ValueError if they are not of the images of the others."""
        self._first = self._first or predictions
        predictions = in_order_of(self._first, predictions)
        for part, images in {ALL: predictions, **predictions.by_magnification()}.items():
            sums = PatientSums(images)
            counts = torch.bincount(sums.labels, minlength=len(images.classes)).tolist()
            self.patients[part] = dict(zip(images.classes, counts, strict=True))
            once = torch.ones(1, len(sums.scores), dtype=torch.float64)
            self._figures[part, cell] = sums.figures(torch.cat([once, self.bootstrap.weights(len(sums.scores))]))

    def mean(self, part: str, figure: str, cells: Iterable[Cell]) -> Estimate:
        """The mean over runs, of those in which the figure is defined."""
        return self._estimate(part, [(cell, self._figures[part, cell][figure]) for cell in cells])

    def difference(self, part: str, figure: str, contrast: Contrast) -> Estimate:
        """The mean over blocks of the mean difference of their pairs, of blocks in which all are defined."""
        figures = {cell: self._figures[part, cell][figure] for pair in contrast.pairs for cell in pair}
        return self._estimate(part, [(b, figures[b] - figures[a]) for a, b in contrast.pairs])

    def _estimate(self, part: str, values: Iterable[tuple[Cell, Tensor]]) -> Estimate:
        by_block: dict[tuple[int, int], list[Tensor]] = {}
        for cell, value in values:
            by_block.setdefault(cell.block, []).append(value)
        means = [torch.stack(found).mean(dim=0) for found in by_block.values()]
        means = [mean for mean in means if not mean[0].isnan()]
        if not means:
            return Estimate(None, None, None, ())
        table = torch.stack(means)  # [blocks, 1 + resamples]
        blocks, drawn = table[:, 0], table[:, 1:]
        over_patients = over_both = None
        if sum(self.patients[part].values()) > 1:
            over_patients = self.bootstrap.interval(drawn.mean(dim=0))
            if len(means) > 1:
                # another seed: as many blocks as patients would be drawn as these are
                times = replace(self.bootstrap, seed=self.bootstrap.seed + 1).weights(len(means)).T
                over_both = self.bootstrap.interval((times * drawn).where(times > 0, 0.0).sum(dim=0) / len(means))
        return Estimate(float(blocks.mean()), over_patients, over_both, tuple(blocks.tolist()))


def read_draws(out: Path, cells: Sequence[Cell], bootstrap: Bootstrap, reporter: Reporter) -> StudyDraws:
    """The draws of finished cells of the study in `out`.

    Raises:
        FileNotFoundError: a cell's predictions are gone.
        ValueError: cells were tested on different images.
    """
    draws = StudyDraws(bootstrap)
    with reporter.task("intervals", len(cells)) as task:
        for cell in cells:
            draws.add(cell, read_predictions(evaluation_folder(out, cell)))
            task.advance(1)
    return draws


def contrasts(cells: Sequence[Cell]) -> list[Contrast]:
    """ER against plain shortcuts, of each depth, and each stain normalisation against none, in the same fold and seed:
    over all levels of the other factor, in blocks that have them all, and at each level.
    """
    er, plain = SHORTCUTS["er"], SHORTCUTS["plain"]
    models, stains = dict.fromkeys(cell.model for cell in cells), dict.fromkeys(cell.stain for cell in cells)
    changes = [("model", model, plain + model.removeprefix(er), "stain") for model in models if model.startswith(er)]
    changes += [("stain", stain, "none", "model") for stain in stains if stain != "none"]
    there, found = set(cells), []
    for factor, second, first, other in changes:
        pairs = [(cell._replace(**{factor: first}), cell) for cell in cells if getattr(cell, factor) == second]  # type: ignore[arg-type]
        pairs = [pair for pair in pairs if pair[0] in there]
        levels = dict.fromkeys(str(getattr(cell, other)) for _, cell in pairs)
        if len(levels) > 1:
            done = [cell.block for _, cell in pairs]
            whole = tuple(pair for pair in pairs if done.count(pair[1].block) == len(levels))
            found.append(Contrast(f"{second} - {first}, all {_PLURALS[other]}", whole))
        found += [
            Contrast(f"{second} - {first}, {level}", tuple(p for p in pairs if getattr(p[1], other) == level))
            for level in levels
        ]
    return [contrast for contrast in found if contrast.pairs]
