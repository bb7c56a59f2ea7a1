"""The short table that ends `python3 dev.py gpu`: every target, what was measured, its share of a copy, a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from record import Row
from records import CORRECTNESS
from tables import columns, number, verdict

LISTED = 20


def step_lines(rows: Sequence[Row]) -> list[str]:
    """What was done: counts a group, then what failed or was left out."""
    lines = []
    for bench in dict.fromkeys(row.bench for row in rows):
        counts = Counter(row.status for row in rows if row.bench == bench)
        lines.append(f"{bench}: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    bad = [row for row in rows if row.status not in ("measured", "pass")]
    bad.sort(key=lambda row: row.status != "FAIL")
    for row in bad[:LISTED]:
        lines.append(f"[{row.status}] {row.bench} {row.name}: {str(row.extra_info.get('detail', ''))[:160]}")
    if len(bad) > LISTED:
        lines.append(f"... and {len(bad) - LISTED} more, in the record")
    return lines


def target_lines(rows: Sequence[Row]) -> list[str]:
    lines = [
        [str(row.extra_info.get("title") or row.name), str(target), number(value),
         number(row.extra_info.get("share_of_copy")), verdict(row, target, value)]
        for row in rows
        for target, value in row.targets()
    ]  # fmt: skip
    if not lines:
        return ["no row has a target"]
    met = f"{sum(line[-1] == 'met' for line in lines)} of {len(lines)} targets met"
    red = any(row.status == "FAIL" and row.bench in CORRECTNESS for row in rows)
    return [
        *columns([["what", "target", "measured", "of copy", "verdict"], *lines]),
        met,
        *(["correctness checks fail: the documents will not report these speeds"] if red else []),
    ]


def final_table(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    commit = f"{machine.get('commit')}{' (changed)' if machine.get('dirty') else ''}"
    torch = machine.get("packages", {}).get("torch")
    head = f"{machine['name']}, driver {machine.get('driver', '-')}, torch {torch}, commit {commit}"
    ceilings = [f"{row.name} {number(row.p50)} {row.unit}" for row in rows if row.group == "ceilings"]
    return "\n".join([head, *ceilings, "", *step_lines(rows), "", *target_lines(rows)])
