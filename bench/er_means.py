"""Geometric means over the stages of ResNet-50, and the targets that they have to reach."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from record import Row
from records import OLDER

STAGES_50 = ("resnet50-1", "resnet50-2", "resnet50-3", "resnet50-4")
STAGE_101 = "resnet101-3"
# bench function: figure, at least
MEAN_TARGETS = {
    "stage_epilogues": {"ratio_naive": 5.0, "ratio_compiled": 2.0},
    "shortcut_sum": {"ratio_naive": 3.5, "ratio_compiled": 1.3},
}


def setting_of(row: Row) -> tuple[int, str, int]:
    """Batch, layout and threads that a row was measured with."""
    return row.params["batch"], row.params["layout"], row.params["threads"]


def mean_rows(rows: Iterable[Row], bench: str, test: str) -> list[Row]:
    """A row for every setting of which all four stages are there; of figures that all four have."""
    settings: dict[tuple[int, str, int], dict[str, Row]] = {}
    for row in rows:
        if row.bench == bench and row.name.partition("[")[0] == test:
            settings.setdefault(setting_of(row), {})[row.params["stage"]] = row
    found = []
    for (batch, layout, threads), stages in sorted(settings.items()):
        chosen = [stages[name] for name in STAGES_50 if name in stages]
        if len(chosen) < len(STAGES_50):
            continue
        targets = {k: v for k, v in MEAN_TARGETS[test].items() if all(k in row.extra_info for row in chosen)}
        info = {key: statistics.geometric_mean(row.extra_info[key] for row in chosen) for key in targets}
        shares = [row.extra_info["share_of_copy"] for row in chosen]
        info |= {"least_share": min(shares), "most_share": max(shares)}
        if STAGE_101 in stages:
            info["ratio_naive_101"] = stages[STAGE_101].extra_info["ratio_naive"]
        if any(OLDER in row.extra_info for row in stages.values()):
            info[OLDER] = True
        milliseconds = statistics.geometric_mean(row.p50 for row in chosen)
        group = chosen[0].group
        found.append(Row(
            bench, f"mean of {test}[{batch}-{layout}-{threads}]", f"{group}: geometric means",
            {"batch": batch, "layout": layout, "threads": threads}, milliseconds, milliseconds, milliseconds, "ms",
            min(row.repeats for row in chosen),
            {**info, "title": f"{group}, mean of the stages of ResNet-50, {batch}, {layout}, {threads}",
             "target": [f"{key} >= {least:g}" for key, least in targets.items()]},
        ))  # fmt: skip
    return found
