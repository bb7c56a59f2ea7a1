"""What a study found: tables, range tests and pictures, as HTML, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ernet_fast.console.atomic_file import write_json, write_text
from ernet_fast.console.tables import format_table, markdown_table
from ernet_fast.diagnosis import environment
from ernet_fast.train import paper, report
from ernet_fast.train.ablation import write_table
from ernet_fast.train.ablation_pictures import estimates_picture, range_picture
from ernet_fast.train.ablation_summary import Summary, Table
from ernet_fast.train.config import TrainConfig

_CAUTION = (
    "Deviations are over folds and seeds, whose training images overlap and whose test images are the same: they say "
    "how far training moves a figure, and not how far other patients would; the intervals over patients do. For the "
    "same reason p-values of the range test are rather too small. No interval or p-value is corrected for the number "
    "of figures: decide beforehand which one counts."
)


class _Section(NamedTuple):
    title: str
    text: str
    tables: Sequence[Table]
    picture: tuple[bytes, str, str] | None = None


def _sections(summary: Summary, out: Path | None) -> Iterator[_Section]:
    """Everything but settings; pictures are drawn into `out`, and left out without it."""
    tables = [summary.treatments_table(), summary.runs_table(), summary.time_table()]
    yield _Section("Networks and preprocessing", "", tables)
    if summary.draws is not None:
        tables = [summary.intervals_table(), summary.contrasts_table(), summary.differences_table()]
        yield _Section("Other patients", "", tables, None if out is None else _estimates(summary, out))
    if summary.tests:
        picture = None
        if out is not None:
            drawn = range_picture(summary.tests, summary.title, out / "ablation.png")
            caption = (
                "Means with half the least significant difference either way: those whose bars do not meet differ."
            )
            picture = (drawn, "Means and groups of the range test", caption)
        yield _Section("Range test", "", summary.test_tables(), picture)
    else:
        text = "No range test: it needs two networks or stains, each finished in the same two folds or seeds or more."
        yield _Section("Range test", text, [])


def _estimates(summary: Summary, out: Path) -> tuple[bytes, str, str]:
    panels = [(summary.title, summary.means()), (f"difference in {summary.title}", summary.differences())]
    drawn = estimates_picture([panel for panel in panels if panel[1]], out / "ablation_runs.png")
    caption = (
        "Dots: runs, or differences of a fold and seed; diamonds: their means, with intervals over patients (thick) "
    )
    return drawn, "Runs, means and differences", caption + "and over patients, folds and seeds (thin)."


def summary_text(summary: Summary) -> str:
    """The tables for a terminal."""
    found = [table for section in _sections(summary, None) for table in section.tables]
    return "\n\n".join(f"{t.caption}\n{format_table(t.header, t.rows, right_from=t.names)}" for t in found if t.rows)


def summary_markdown(summary: Summary) -> str:
    """The tables as Markdown, to be put into a page."""
    parts = [f"# Ablation study\n\n{_subtitle(summary)}.\n\n{_CAUTION}"]
    for section in _sections(summary, None):
        parts.append(f"## {section.title}" + (f"\n\n{section.text}" if section.text else ""))
        shown = [table for table in section.tables if table.rows]
        parts += [f"{t.caption}\n\n{markdown_table(t.header, t.rows, right_from=t.names)}" for t in shown]
    return "\n\n".join(parts) + "\n"


def write_summary(summary: Summary, out: Path) -> Path:
    """Write ablation.html, .md, .json and .csv into `out`, ablation_runs.png where there are intervals, ablation.png
    where there is a test; returns the page's path.
    """
    write_table(out / "ablation.csv", summary.results)
    write_json(out / "ablation.json", summary.to_dict())
    write_text(out / "ablation.md", summary_markdown(summary))
    blocks = [report.note(_CAUTION)]
    for section in _sections(summary, out):
        shown = [report.table(t.header, t.rows, caption=t.caption) for t in section.tables if t.rows]
        text = [report.paragraph(section.text)] if section.text else []
        pictures = [] if section.picture is None else [report.pictures([section.picture])]
        blocks.append(report.section(section.title, *text, *shown, *pictures))
    return report.write_report(
        out / "ablation.html", title="Ablation study", subtitle=_subtitle(summary),
        blocks=[*blocks, _paper_tables(summary), _settings(summary)],
        footer="One line a run: ablation.csv. The same figures as plain values: ablation.json. The tables as Markdown: "
        "ablation.md.",
    )  # fmt: skip


def _subtitle(summary: Summary) -> str:
    size = summary.results[0].figures
    left = "" if len(summary.results) == summary.planned else f" (of {summary.planned}; the others are not finished)"
    tested = f"{size['overall']['images']} test images of {size['patients']} patients"
    return f"{len(summary.results)} runs{left}, tested on the same {tested}"


def _paper_tables(summary: Summary) -> report.Block:
    settings = [TrainConfig.from_dict(result.figures["settings"]) for result in summary.results]
    networks = list({config.model: config for config in reversed(settings)}.values())[::-1]
    magnifications = summary.magnification_table()
    return report.section(
        "In the form of the paper's tables",
        report.table(paper.TABLE_1_HEADER, paper.table_1(networks), caption=f"Table 1: {paper.CLASSES} classes, "
                     f"one image of {paper.SIZE}x{paper.SIZE}; multiply-accumulates times two."),
        report.table(magnifications.header, magnifications.rows, caption=f"Table 2: {magnifications.caption}"),
        *(report.paragraph(text) for text in paper.CONTRADICTIONS),
    )  # fmt: skip


def _settings(summary: Summary) -> report.Block:
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
