"""Figures as aligned text, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FIGURES = (
    ("images", "images"),
    ("accuracy", "accuracy"),
    ("balanced_accuracy", "balanced"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("specificity", "specificity"),
    ("f1", "F1"),
    ("mcc", "MCC"),
    ("auc", "AUC"),
    ("ece", "ECE"),
)
PATIENT_FIGURES = (
    ("patients", "patients"),
    ("patient_recognition_rate", "recognition rate"),
    ("patient_auc", "patient AUC"),
)


def title_of(figure: str) -> str:
    """The name of a figure in words."""
    titles = dict([*FIGURES, *PATIENT_FIGURES])
    return titles.get(figure, figure.replace("_", " "))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int = 1) -> str:
    """Columns aligned with spaces; those from `right_from` on to the right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    layout = "  ".join(f"{{:{'<' if k < right_from else '>'}{width}}}" for k, width in enumerate(widths))
    table = [header, ["-" * width for width in widths], *rows]
    return "\n".join(layout.format(*row).rstrip() for row in table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int = 1) -> str:
    """A Markdown table, whose columns from `right_from` on are aligned to the right."""
    rule = ["---" if k < right_from else "--:" for k in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def format_figure(value: float | int | None) -> str:
    """Three decimals, a whole number, or a dash for what is undefined.

    What is not 0 or 1 is not shown as 0 or 1: it gets as many decimals as that takes, up to nine.
    """
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    shown = [f"{value:.{decimals}f}" for decimals in range(3, 10)]
    return next((text for text in shown if float(text) not in (0.0, 1.0) or float(text) == value), shown[-1])


def format_interval(bounds: Sequence[float] | None) -> str:
    """Lower and upper bound, or a dash where there is none."""
    return "-" if bounds is None else f"{format_figure(bounds[0])} to {format_figure(bounds[1])}"


def format_difference(value: float | None) -> str:
    """Three decimals and a sign, or a dash for what is undefined."""
    return "-" if value is None else f"{value:+.3f}"


def metrics_rows(figures: dict[str, Any]) -> list[list[str]]:
    """Rows of the metrics table of `Evaluation.figures()`: all images, then each magnification."""
    groups = _groups(figures)
    return [[name, *(format_figure(group[key]) for key, _ in FIGURES)] for name, group in groups.items()]


def metrics_header() -> list[str]:
    """Header of `metrics_rows`."""
    return ["set", *(title for _, title in FIGURES)]


def _groups(part: dict[str, Any]) -> dict[str, Any]:
    return {"all": part["overall"], **part["by_magnification"]}


def patient_rows(figures: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of figures by patient, each with its interval where there is one."""
    found = _groups(figures["intervals"]) if figures["intervals"] else {}
    rows = []
    for name, group in _groups(figures["by_patient"]).items():
        cells = [name, format_figure(group["patients"])]
        for key, _ in PATIENT_FIGURES[1:]:
            bounds = found[name][key] if found else None
            cells.append(format_figure(group[key]) + ("" if bounds is None else f" ({format_interval(bounds)})"))
        rows.append(cells)
    return rows


def patient_header() -> list[str]:
    """Header of `patient_rows`."""
    return ["set", *(title for _, title in PATIENT_FIGURES)]


def interval_rows(figures: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of the intervals of `metrics_rows`."""
    groups = _groups(figures["intervals"])
    return [[name, *(format_interval(group[key]) for key, _ in FIGURES[1:])] for name, group in groups.items()]


def interval_header() -> list[str]:
    """Header of `interval_rows`."""
    return ["set", *(title for _, title in FIGURES[1:])]


def interval_caption(found: dict[str, Any]) -> str:
    """What the intervals are."""
    kind = f"{found['resamples']} bootstrap resamples of patients, seed {found['seed']}"
    return f"{100 * found['level']:g} % intervals: {kind}"
