"""The figures of a study: means over runs, intervals, paired differences and range tests, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

from ernet_fast.console.tables import format_difference, format_figure, format_interval, title_of
from ernet_fast.diagnosis import environment
from ernet_fast.train.ablation import CellResult, by_treatment, complete_blocks, factors, mean_and_deviation
from ernet_fast.train.ablation_intervals import ALL, Contrast, Estimate, StudyDraws, contrasts
from ernet_fast.train.bootstrap import FIGURES
from ernet_fast.train.range_test import RangeTest, tukey

_SHOWN = ("accuracy", "f1", "mcc", "auc", "patient_recognition_rate", "patient_auc")


class Table(NamedTuple):
    """A caption, and a table whose first `names` columns are no numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True)
class Summary:
    """Finished cells of `planned` ones, the figure that is tested, a test of each factor that can be tested, and what
    intervals are of, unless they are left out.
    """

    results: tuple[CellResult, ...]
    planned: int
    figure: str
    tests: dict[str, RangeTest]
    draws: StudyDraws | None = None

    @property
    def title(self) -> str:
        """The figure that is tested, in words."""
        return title_of(self.figure)

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[CellResult]]:
        """Results of each network and stain."""
        return by_treatment(self.results)

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """What differs in one thing alone."""
        return contrasts([result.cell for result in self.results])

    def means(self, figure: str | None = None, part: str = ALL) -> dict[str, Estimate]:
        """The mean of a figure (default: the one that is tested) of each network and stain; needs `draws`."""
        assert self.draws is not None
        named = {f"{model}, {stain}": [r.cell for r in group] for (model, stain), group in self.groups.items()}
        return {name: self.draws.mean(part, figure or self.figure, cells) for name, cells in named.items()}

    def differences(self, figure: str | None = None, part: str = ALL) -> dict[str, Estimate]:
        """The paired difference of a figure of each contrast; needs `draws`."""
        assert self.draws is not None
        return {c.name: self.draws.difference(part, figure or self.figure, c) for c in self.contrasts}

    def treatments_table(self) -> Table:
        """Each network and stain: mean and deviation of the main figures, letters of the range test of all
        combinations, or of the only factor.
        """
        letters = self._letters()
        rows = []
        for (model, stain), group in self.groups.items():
            cells = [_spread([result.figure(name) for result in group]) for name in _SHOWN]
            rows.append([model, stain, str(len(group)), letters.get((model, stain), "-"), *cells])
        header = ["network", "stain", "runs", f"group by {self.title}", *_words(_SHOWN)]
        caption = "Mean ± standard deviation over folds and seeds. Treatments that do not differ share a letter."
        return Table(caption, header, rows, 2)

    def _letters(self) -> dict[tuple[str, str], str]:
        whole = self.tests.get("combination")
        found = {t.name: t.letters for test in ([whole] if whole else self.tests.values()) for t in test.treatments}
        return {(m, s): found.get(f"{m}, {s}", found.get(m, found.get(s, "-"))) for m, s in self.groups}

    def runs_table(self) -> Table:
        """The figure that is tested of every run."""
        blocks = sorted({result.cell.block for result in self.results}, key=lambda block: block[::-1])
        rows = []
        for (model, stain), group in self.groups.items():
            found = {result.cell.block: format_figure(result.figure(self.figure)) for result in group}
            rows.append([model, stain, *(found.get(block, "") for block in blocks)])
        header = ["network", "stain", *(f"fold {fold}, seed {seed}" for fold, seed in blocks)]
        return Table(f"Every run: {self.title}.", header, rows, 2)

    def time_table(self) -> Table:
        """Epochs and seconds an epoch."""
        rows = []
        for (model, stain), group in self.groups.items():
            runs = [median(result.epoch_seconds) for result in group if result.epoch_seconds]
            if runs:
                epochs = sorted({len(result.epoch_seconds) for result in group if result.epoch_seconds})
                best = mean_and_deviation([result.figures["epoch"] for result in group])[0]
                shown = ", ".join(map(str, epochs)), f"{best:.1f}", f"{median(runs):.1f}"
                rows.append([model, stain, *shown, f"{min(runs):.1f} to {max(runs):.1f}"])
        caption = (
            "Training: epochs, the one that was kept on average, and seconds an epoch: the median over runs of their "
            "medians, and from the fastest run to the slowest. What else the machine did is in them: no benchmark."
        )
        return Table(caption, ["network", "stain", "epochs", "kept epoch", "seconds an epoch", "runs"], rows, 2)

    def intervals_table(self) -> Table:
        """Each network and stain: means with intervals over patients."""
        found = {name: self.means(name) for name in _SHOWN}
        rows = [
            [*treatment, *(_with_interval(estimates[", ".join(treatment)]) for estimates in found.values())]
            for treatment in self.groups
        ]
        assert self.draws is not None
        patients = ", ".join(f"{count} {name}" for name, count in self.draws.patients[ALL].items())
        caption = f"Mean over runs ({self._kind()} over patients, of whom there are {patients})."
        return Table(caption, ["network", "stain", *_words(_SHOWN)], rows, 2)

    def contrasts_table(self) -> Table:
        """The paired difference of the figure that is tested, of each contrast, with both intervals."""
        rows = []
        for name, found in self.differences().items():
            higher = sum(value > 0 for value in found.blocks)
            intervals = format_interval(found.over_patients), format_interval(found.over_both)
            rows.append([name, format_difference(found.value), *intervals, f"{higher} of {len(found.blocks)}"])
        caption = (
            f"Difference in {self.title} in the same fold and seed: mean, {self._kind()} over patients, and over "
            "patients, folds and seeds; in how many folds and seeds it is positive."
        )
        return Table(caption, ["", "difference", "over patients", "over patients and runs", "positive"], rows)

    def differences_table(self) -> Table:
        """The paired differences of the main figures."""
        found = {name: self.differences(name) for name in _SHOWN}
        rows = [
            [contrast.name, *(_difference(estimates[contrast.name]) for estimates in found.values())]
            for contrast in self.contrasts
        ]
        caption = f"The same of the main figures ({self._kind()} over patients, folds and seeds)."
        return Table(caption, ["", *_words(_SHOWN)], rows)

    def _kind(self) -> str:
        assert self.draws is not None
        bootstrap = self.draws.bootstrap
        return f"{100 * bootstrap.level:g} % interval of {bootstrap.resamples} draws"

    def test_tables(self) -> list[Table]:
        """The treatments of each factor with their letters."""
        found = []
        for factor, test in self.tests.items():
            caption = (
                f"Tukey's range test of {factor} by {self.title}, {test.blocks} blocks (fold and seed): means further "
                f"apart than {test.least:.4f} differ at {test.alpha:g}."
            )
            rows = [
                [t.name, f"{t.mean:.4f}", f"{t.deviation:.4f}", t.letters, _closest(test, t.name)]
                for t in test.treatments
            ]
            found.append(Table(caption, [factor, "mean", "deviation", "group", "smallest p"], rows))
        return found

    def magnification_table(self) -> Table:
        """Figures of each network and stain at each magnification, in the form of the paper's Table 2."""
        names = list(dict.fromkeys(name for r in self.results for name in r.figures["by_magnification"]))
        shown = list(dict.fromkeys(["accuracy", "auc", self.figure]))
        shown = [name for name in shown if name in self.results[0].figures["overall"]]
        rows = []
        for figure in shown:
            estimates = {} if self.draws is None else {name: self.means(figure, name) for name in names}
            for (model, stain), group in self.groups.items():
                treatment, row = f"{model}, {stain}", []
                for name in names:
                    row.append(_spread([r.figures["by_magnification"].get(name, {}).get(figure) for r in group]))
                    bounds = estimates[name][treatment].over_patients if estimates else None
                    row[-1] += "" if bounds is None else f" ({format_interval(bounds)})"
                rows.append([treatment, title_of(figure), *row])
        caption = "by magnification, mean ± standard deviation over folds and seeds"
        if self.draws is not None:
            caption += f" ({self._kind()} over patients; none where a tenth of the draws lack a class)"
        caption += "."
        return Table(caption, ["network, stain", "figure", *names], rows, 2)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        treatments = []
        for (model, stain), group in self.groups.items():
            pairs = {name: mean_and_deviation([r.figure(name) for r in group]) for name in FIGURES}
            treatments.append(
                {
                    "model": model,
                    "stain": stain,
                    "runs": len(group),
                    "mean": {name: pair[0] for name, pair in pairs.items()},
                    "deviation": {name: pair[1] for name, pair in pairs.items()},
                    "seconds_per_epoch": [median(r.epoch_seconds) for r in group if r.epoch_seconds],
                }
            )
        tests = {
            factor: {
                "alpha": test.alpha, "blocks": test.blocks, "least_significant_difference": test.least,
                "treatments": [t._asdict() for t in test.treatments], "pairs": [p._asdict() for p in test.pairs],
            }
            for factor, test in self.tests.items()
        }  # fmt: skip
        return {
            "finished": len(self.results), "planned": self.planned, "figure": self.figure, "treatments": treatments,
            "intervals": self._intervals(), "range_tests": tests,
            "cells": [result.cell._asdict() for result in self.results], "environment": environment(),
        }  # fmt: skip

    def _intervals(self) -> dict[str, Any] | None:
        """Means and differences with intervals: by part of the test images, then figure, then name."""
        if self.draws is None:
            return None
        bootstrap = self.draws.bootstrap
        found: dict[str, Any] = {"level": bootstrap.level, "resamples": bootstrap.resamples, "seed": bootstrap.seed}
        found["patients"] = self.draws.patients
        for kind, estimates in (("means", self.means), ("differences", self.differences)):
            found[kind] = {
                part: {
                    figure: {name: estimate._asdict() for name, estimate in estimates(figure, part).items()}
                    for figure in FIGURES
                }
                for part in self.draws.patients
            }
        return found


def summarise(
    results: Sequence[CellResult], planned: int, figure: str, alpha: float = 0.05, draws: StudyDraws | None = None
) -> Summary:
    """Test each factor with two levels or more on the blocks that are complete, if there are two."""
    if figure not in FIGURES:
        raise ValueError(f"figure={figure!r}; expected one of {', '.join(FIGURES)}.")
    blocks = complete_blocks(results, figure)
    tests = {}
    if len(blocks) > 1:
        tests = {factor: tukey(values, alpha=alpha) for factor, values in factors(blocks).items()}
    return Summary(tuple(results), planned, figure, tests, draws)


def _words(names: Sequence[str]) -> list[str]:
    return [title_of(name) for name in names]


def _spread(values: Sequence[float | None]) -> str:
    mean, deviation = mean_and_deviation(values)
    return format_figure(mean) + ("" if deviation is None else f" ± {format_figure(deviation)}")


def _with_interval(found: Estimate) -> str:
    bounds = found.over_patients
    return format_figure(found.value) + ("" if bounds is None else f" ({format_interval(bounds)})")


def _difference(found: Estimate) -> str:
    bounds = found.over_both or found.over_patients
    return format_difference(found.value) + ("" if bounds is None else f" ({format_interval(bounds)})")


def _closest(test: RangeTest, name: str) -> str:
    """The smallest p-value of a treatment against another, and which one."""
    p, other = min((pair.p_value, pair.second if pair.first == name else pair.first) for pair in test.pairs
                   if name in (pair.first, pair.second))  # fmt: skip
    return f"{p:.4f} ({other})"
