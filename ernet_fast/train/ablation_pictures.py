"""Pictures of a study: its runs and differences with intervals, and the range tests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ernet_fast.train.ablation_intervals import Estimate
from ernet_fast.train.pictures import INK, MUTED, PALETTE, new_figure, save_figure, style_axes
from ernet_fast.train.range_test import RangeTest

_ROW = 0.3
"""Inches of a row."""


def estimates_picture(
    panels: Sequence[tuple[str, Mapping[str, Estimate]]], path: str | os.PathLike[str] | None = None
) -> bytes:
    """Panels of (axis label, estimates by name): a dot a block, the mean, and its intervals over patients (thick) and
    over patients and blocks (thin). PNG bytes, and a file if `path` is given.
    """
    counts = [len(estimates) for _, estimates in panels]
    figure = new_figure(7.6, 0.8 * len(panels) + _ROW * sum(counts))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[n + 1.5 for n in counts])[:, 0]
    for axes, (label, estimates) in zip(grid, panels, strict=True):
        for row, found in enumerate(estimates.values()):
            for bounds, width in ((found.over_both, 1.0), (found.over_patients, 3.0)):
                if bounds is not None:
                    axes.plot(bounds, [row, row], color=MUTED, linewidth=width, solid_capstyle="butt", zorder=2)
            axes.scatter(found.blocks, [row + 0.22] * len(found.blocks), s=12, color=PALETTE[0], alpha=0.7, lw=0)
            if found.value is not None:
                axes.scatter([found.value], [row], s=34, marker="D", color=PALETTE[1], zorder=3)
        _rows(axes, list(estimates), label)
        low, high = axes.get_xlim()
        if low < 0 < high:
            axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    return save_figure(figure, path)


def range_picture(
    tests: Mapping[str, RangeTest], figure_name: str, path: str | os.PathLike[str] | None = None
) -> bytes:
    """Means with half the least significant difference either way, of each factor: bars that do not meet differ."""
    counts = [len(test.treatments) for test in tests.values()]
    figure = new_figure(7.6, 0.9 * len(counts) + _ROW * sum(counts))
    grid = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
    for axes, (factor, test) in zip(grid, tests.items(), strict=True):
        means = [t.mean for t in test.treatments]
        rows = range(len(means))
        axes.errorbar(means, rows, xerr=test.least / 2, fmt="o", color=PALETTE[0], ecolor=MUTED, ms=5, capsize=3)
        for row, treatment in zip(rows, test.treatments, strict=True):
            axes.annotate(treatment.letters, (treatment.mean, row), xytext=(0, 5), textcoords="offset points",
                          ha="center", size=8, color=INK)  # fmt: skip
        axes.set_title(factor)
        _rows(axes, [t.name for t in test.treatments], figure_name)
    return save_figure(figure, path)


def _rows(axes: Any, names: Sequence[str], label: str) -> None:
    """Rows from the top, each with its name."""
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.4, -0.7), xlabel=label)
    style_axes(axes)
