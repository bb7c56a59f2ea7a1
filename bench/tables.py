"""Tables of rows, as data: a column is a head and what a row has there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from record import Row, Target
from records import OLDER, Records
from this_tree import processor

NONE = "–"
NOT_MEASURED = "Not measured."


def number(value: float | None) -> str:
    """Three significant digits, thousands in k; a dash where there is none."""
    if value is None:
        return NONE
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"


def time_of(milliseconds: float | None) -> str:
    """Three significant digits and a unit."""
    if milliseconds is None:
        return NONE
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def cpu_name(machine: Mapping[str, Any], isa: str | None = None) -> str:
    """Name, family and instruction set: "AMD EPYC, family 25 model 1 (Zen 3), AVX2"."""
    found = machine.get("processor")
    return processor.processor_text(found, isa) if found else f"{machine['cpu']}, family not recorded"


def title_of(row: Row) -> str:
    return str(row.extra_info.get("title") or f"{row.group}: {row.name}")


def starred(text: object, *rows: Row) -> str:
    """A name, with a star if one of the rows is from an older record than the newest."""
    return f"{text} *" if any(OLDER in row.extra_info for row in rows) else str(text)


def verdict(row: Row, target: Target, value: float | None) -> str:
    if value is None:
        return row.status if row.status not in ("measured", "pass") else "not measured"
    return "met" if target.met(value) else "MISSED"


def verdicts(row: Row) -> str:
    return "; ".join(f"{target} {verdict(row, target, value)}" for target, value in row.targets()) or NONE


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (head, *lines)]
    return "\n".join(f"| {row} |" for row in (rows[0], " | ".join("---" for _ in head), *rows[1:]))


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text with their cells under each other."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


class Column(NamedTuple):
    """A column: its head, and the cell of a row."""

    head: str
    cell: Callable[[Row], str]


def figure(head: str, key: str, show: Callable[[Any], str] = number, factor: float = 1.0, per: str = "") -> Column:
    """A number of extra_info times `factor`, divided by another number of it if `per` names one."""

    def cell(row: Row) -> str:
        value = row.extra_info.get(key)
        if value is None:
            return NONE
        return show(factor * value / row.extra_info[per] if per else factor * value)

    return Column(head, cell)


def param(head: str, key: str) -> Column:
    return Column(head, lambda row: starred(row.params[key], row))


P50 = Column("ms", lambda row: number(row.p50))
SPREAD = Column("20th to 80th percentile", lambda row: f"{number(row.p20)} to {number(row.p80)}")
SHARE = figure("share of copy bandwidth", "share_of_copy", percent)
TARGETS = Column("targets", verdicts)
TITLE = Column("what", title_of)


def table(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    lines = [[column.cell(row) for column in columns] for row in rows]
    return markdown([column.head for column in columns], lines) if lines else NOT_MEASURED


class Table(NamedTuple):
    """Rows of one bench: `test` is a function in it, all where it is empty; `chosen` picks rows, `order` sorts them."""

    bench: str
    test: str
    columns: Sequence[Column]
    chosen: Callable[[Row], bool] = lambda row: True
    order: Callable[[Row], Any] | None = None

    def __call__(self, records: Records) -> str:
        rows = [row for row in records.rows("cpu", self.bench, self.test) if self.chosen(row)]
        return table(sorted(rows, key=self.order) if self.order else rows, self.columns)
