"""What a study found: one table, range tests with their picture, as HTML and JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernet_fast.console.atomic_file import write_json
from ernet_fast.console.tables import format_figure, format_table
from ernet_fast.diagnosis import environment
from ernet_fast.train import paper, report
from ernet_fast.train.ablation import (
    CellResult,
    by_treatment,
    complete_blocks,
    factors,
    mean_and_deviation,
    write_table,
)
from ernet_fast.train.bootstrap import FIGURES
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.pictures import INK, MUTED, PALETTE, new_figure, save_figure, style_axes
from ernet_fast.train.range_test import RangeTest, tukey

_SHOWN = ("accuracy", "f1", "mcc", "auc", "patient_recognition_rate", "patient_auc")
_CAUTION = (
    "Deviations are over folds and seeds, whose training images overlap and whose test images are the same: they say "
    "how far training moves a figure, and not how far other patients would. For the same reason p-values of the range "
    "test are rather too small. ernet-fast compare, on two cells' evaluation folders, gives intervals over patients."
)


@dataclass(frozen=True)
class Summary:
    """Finished cells of `planned` ones, the figure that is tested, and a test of each factor that can be tested."""

    results: tuple[CellResult, ...]
    planned: int
    figure: str
    tests: dict[str, RangeTest]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: each network and stain, mean and deviation of the main figures, letters of the range test
        of all combinations, or of the only factor.
        """
        letters = self._letters()
        titles = [name.replace("_", " ") for name in _SHOWN]
        rows = []
        for (model, stain), group in by_treatment(self.results).items():
            cells = [_spread([result.figure(name) for result in group]) for name in _SHOWN]
            rows.append([model, stain, str(len(group)), letters.get((model, stain), "-"), *cells])
        return ["network", "stain", "runs", f"group by {self.figure}", *titles], rows

    def _letters(self) -> dict[tuple[str, str], str]:
        whole = self.tests.get("combination")
        found = {t.name: t.letters for test in ([whole] if whole else self.tests.values()) for t in test.treatments}
        keys = by_treatment(self.results)
        return {(m, s): found.get(f"{m}, {s}", found.get(m, found.get(s, "-"))) for m, s in keys}

    def test_rows(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Of each factor: a sentence, header and rows of its treatments."""
        found = []
        for factor, test in self.tests.items():
            title = (
                f"Tukey's range test of {factor} by {self.figure.replace('_', ' ')}, {test.blocks} blocks (fold and "
                f"seed): means further apart than {test.least:.4f} differ at {test.alpha:g}"
            )
            rows = [
                [t.name, f"{t.mean:.4f}", f"{t.deviation:.4f}", t.letters, _closest(test, t.name)]
                for t in test.treatments
            ]
            found.append((title, [factor, "mean", "deviation", "group", "smallest p"], rows))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        treatments = []
        for (model, stain), group in by_treatment(self.results).items():
            pairs = {name: mean_and_deviation([r.figure(name) for r in group]) for name in FIGURES}
            treatments.append(
                {
                    "model": model,
                    "stain": stain,
                    "runs": len(group),
                    "mean": {name: pair[0] for name, pair in pairs.items()},
                    "deviation": {name: pair[1] for name, pair in pairs.items()},
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
            "range_tests": tests, "cells": [result.cell._asdict() for result in self.results],
            "environment": environment(),
        }  # fmt: skip


def summarise(results: Sequence[CellResult], planned: int, figure: str, alpha: float = 0.05) -> Summary:
    """Test each factor with two levels or more on the blocks that are complete, if there are two."""
    if figure not in FIGURES:
        raise ValueError(f"figure={figure!r}; expected one of {', '.join(FIGURES)}.")
    blocks = complete_blocks(results, figure)
    tests = {}
    if len(blocks) > 1:
        tests = {factor: tukey(values, alpha=alpha) for factor, values in factors(blocks).items()}
    return Summary(tuple(results), planned, figure, tests)


def _spread(values: Sequence[float | None]) -> str:
    mean, deviation = mean_and_deviation(values)
    return format_figure(mean) + ("" if deviation is None else f" ± {format_figure(deviation)}")


def _closest(test: RangeTest, name: str) -> str:
    """The smallest p-value of a treatment against another, and which one."""
    p, other = min((pair.p_value, pair.second if pair.first == name else pair.first) for pair in test.pairs
                   if name in (pair.first, pair.second))  # fmt: skip
    return f"{p:.4f} ({other})"


def summary_text(summary: Summary) -> str:
    """The tables for a terminal."""
    header, rows = summary.table()
    parts = [format_table(header, rows, right_from=2)]
    parts += [f"{title}\n" + format_table(head, lines) for title, head, lines in summary.test_rows()]
    return "\n\n".join(parts)


def range_picture(summary: Summary, path: str | os.PathLike[str] | None = None) -> bytes:
    """Means with half the least significant difference either way, of each factor: bars that do not meet differ."""
    tests = summary.tests
    counts = [len(test.treatments) for test in tests.values()]
    figure = new_figure(7.6, 0.9 * len(counts) + 0.33 * sum(counts))
    grid = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
    for axes, (factor, test) in zip(grid, tests.items(), strict=True):
        means = [t.mean for t in test.treatments]
        rows = range(len(means))
        axes.errorbar(means, rows, xerr=test.least / 2, fmt="o", color=PALETTE[0], ecolor=MUTED, ms=5, capsize=3)
        for row, treatment in zip(rows, test.treatments, strict=True):
            axes.annotate(treatment.letters, (treatment.mean, row), xytext=(0, 5), textcoords="offset points",
                          ha="center", size=8, color=INK)  # fmt: skip
        axes.set_yticks(rows, [t.name for t in test.treatments])
        axes.set(ylim=(len(means) - 0.4, -0.7), title=factor, xlabel=summary.figure.replace("_", " "))
        style_axes(axes)
    return save_figure(figure, path)


def _magnification_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Accuracy of each network and stain at each magnification, in the form of the paper's Table 2."""
    groups = by_treatment(summary.results)
    names = list(dict.fromkeys(name for r in summary.results for name in r.figures["by_magnification"]))
    rows = []
    for (model, stain), group in groups.items():
        found = [[r.figures["by_magnification"].get(name, {}).get("accuracy") for r in group] for name in names]
        rows.append([f"{model}, {stain}", *(_spread(values) for values in found)])
    return ["network, stain", *names], rows


def write_summary(summary: Summary, out: Path) -> Path:
    """Write ablation.html, .json, .csv, and .png where there is a test, into `out`; returns the page's path."""
    write_table(out / "ablation.csv", summary.results)
    write_json(out / "ablation.json", summary.to_dict())
    header, rows = summary.table()
    magnifications, accuracies = _magnification_rows(summary)
    settings = [TrainConfig.from_dict(group[0].figures["settings"]) for group in by_treatment(summary.results).values()]
    networks = list({config.model: config for config in settings}.values())
    size = summary.results[0].figures
    images = size["overall"]["images"]
    blocks = [
        report.note(_CAUTION),
        report.section(
            "Networks and preprocessing",
            report.table(header, rows, caption=f"Mean and deviation over folds and seeds, on {images} test images of "
                         f"{size['patients']} patients. Treatments that do not differ share a letter."),
        ),
        *_test_blocks(summary, out),
        report.section(
            "In the form of the paper's tables",
            report.table(paper.TABLE_1_HEADER, paper.table_1(networks), caption=f"Table 1: {paper.CLASSES} classes, "
                         f"one image of {paper.SIZE}x{paper.SIZE}; multiply-accumulates times two."),
            report.table(magnifications, accuracies, caption="Table 2: accuracy by magnification."),
            *(report.paragraph(text) for text in paper.CONTRADICTIONS),
        ),
        _settings_block(summary),
    ]  # fmt: skip
    left = "" if len(summary.results) == summary.planned else f" (of {summary.planned}; the others are not finished)"
    return report.write_report(
        out / "ablation.html", title="Ablation study", subtitle=f"{len(summary.results)} runs{left}", blocks=blocks,
        footer="One line a run: ablation.csv. The same figures as plain values: ablation.json.",
    )  # fmt: skip


def _test_blocks(summary: Summary, out: Path) -> list[report.Block]:
    if not summary.tests:
        text = "No range test: it needs two networks or stains, each finished in the same two folds or seeds or more."
        return [report.section("Range test", report.paragraph(text))]
    tables = [report.table(head, rows, caption=f"{title}.") for title, head, rows in summary.test_rows()]
    caption = "Means with half the least significant difference either way: those whose bars do not meet differ."
    picture = (range_picture(summary, out / "ablation.png"), "Means and groups of the range test", caption)
    return [report.section("Range test", *tables, report.pictures([picture]))]


def _settings_block(summary: Summary) -> report.Block:
    shared = summary.results[0].figures["settings"]
    swept = ("model", "stain", "fold", "seed", "out")
    there = environment()
    rows = [
        ["seeds", ", ".join(sorted({str(r.cell.seed) for r in summary.results}))],
        ["folds", ", ".join(sorted({str(r.cell.fold) for r in summary.results}))],
        ["settings", ", ".join(f"{k}={v}" for k, v in shared.items() if v is not None and k not in swept)],
        ["processor", f"{there['processor']}, {there['cores']} cores"],
        ["packages", ", ".join(f"{name} {version}" for name, version in there["packages"].items())],
    ]
    return report.section("Settings and environment", report.table(["", ""], rows, kind="text"))
