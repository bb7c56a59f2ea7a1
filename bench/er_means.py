"""Geometric means over the stages of ResNet-50, and the targets that they have to reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from record import Record, Row

STAGES_50 = ("resnet50-1", "resnet50-2", "resnet50-3", "resnet50-4")
STAGE_101 = "resnet101-3"
# bench function: figure, at least
MEAN_TARGETS = {
    "stage_tails": {"ratio_naive": 5.0, "ratio_compiled": 2.0},
    "shortcut_sum": {"ratio_naive": 3.0, "ratio_compiled": 1.3},
}


class Setting(NamedTuple):
    """What the stages of one mean have in common."""

    batch: int
    layout: str
    threads: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))


def rows_of(rows: Iterable[Row], test: str) -> list[Row]:
    """The rows of one bench function."""
    return [row for row in rows if row.name == test or row.name.startswith(f"{test}[")]


def settings(rows: Iterable[Row]) -> list[Setting]:
    """Batch, layout and threads that rows were measured with."""
    return sorted({setting_of(row) for row in rows})


def setting_of(row: Row) -> Setting:
    return Setting(row.params["batch"], row.params["layout"], row.params["threads"])


def with_setting(rows: Iterable[Row], setting: Setting) -> list[Row]:
    """Those rows, in the order of the stages."""
    order = [*STAGES_50, STAGE_101]
    return sorted((row for row in rows if setting_of(row) == setting), key=lambda row: order.index(row.params["stage"]))


def geometric_mean(rows: Sequence[Row], key: str) -> float | None:
    """Over the four stages of ResNet-50 of one setting; None unless each has the figure, a key or "p50"."""
    found = {row.params["stage"]: row.p50 if key == "p50" else row.extra_info.get(key) for row in rows}
    values = [float(found[stage]) for stage in STAGES_50 if found.get(stage) is not None]
    return statistics.geometric_mean(values) if len(values) == len(STAGES_50) else None


def record_means(record: Record, record_row: Callable[..., Row], bench: str, test: str) -> list[Row]:
    """Add a row for every setting of which the record has all four stages."""
    rows = rows_of((row for row in record.rows() if row.bench == bench), test)
    written = []
    for setting in settings(rows):
        chosen = with_setting(rows, setting)
        milliseconds = geometric_mean(chosen, "p50")
        ratios = {key: geometric_mean(chosen, key) for key in MEAN_TARGETS[test]}
        known = {key: value for key, value in ratios.items() if value is not None}
        if milliseconds is None or not known:
            continue
        row = record_row(
            f"{chosen[0].group}: geometric means",
            **dict.fromkeys(("p20", "p50", "p80"), milliseconds),
            unit="ms",
            repeats=min(row.repeats for row in chosen),
            name=f"mean of {test}[{'-'.join(map(str, setting))}]",
            params=setting._asdict(),
            title=f"{chosen[0].group}, mean of the stages of ResNet-50, {setting}",
            target=[f"{key} >= {MEAN_TARGETS[test][key]}" for key in known],
            **known,
        )
        written.append(row)
    return written
