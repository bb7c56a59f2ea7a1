"""The short table that ends `python3 dev.py gpu`: every target, what was measured, its share of a copy, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from record import Row
from tables import columns, number, verdict

LISTED = 20


def bar_lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line a target: what, target, measured, share of copy bandwidth, verdict."""
    lines = []
    for row in rows:
        share = row.extra_info.get("share_of_copy")
        for target, value in row.targets():
            what = row.extra_info.get("title") or row.name
            lines.append([str(what), str(target), number(value), number(share), verdict(row, target, value)])
    return lines


def step_lines(rows: Sequence[Row]) -> list[str]:
    """What was done: counts a group, then what failed or was left out."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        of_bench = counts.setdefault(row.bench, {})
        of_bench[row.status] = of_bench.get(row.status, 0) + 1
    lines = [
        f"{bench}: {', '.join(f'{number} {status}' for status, number in of_bench.items())}"
        for bench, of_bench in counts.items()
    ]
    bad = [row for row in rows if row.status not in ("measured", "pass")]
    bad.sort(key=lambda row: row.status != "FAIL")
    lines += [
        f"[{row.status}] {row.bench} {row.name}: {str(row.extra_info.get('detail', ''))[:160]}" for row in bad[:LISTED]
    ]
    if len(bad) > LISTED:
        lines.append(f"... and {len(bad) - LISTED} more, in the record")
    return lines


def final_table(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole text."""
    packages = machine.get("packages", {})
    commit = f"{machine.get('commit')}{' (changed)' if machine.get('dirty') else ''}"
    head = f"{machine['name']}, driver {machine.get('driver', '-')}, torch {packages.get('torch')}, commit {commit}"
    ceilings = [f"{row.name} {number(row.p50)} {row.unit}" for row in rows if row.group == "ceilings"]
    lines = [head, *ceilings, "", *step_lines(rows), ""]
    targets = bar_lines(rows)
    if targets:
        lines += columns([["what", "target", "measured", "of copy", "verdict"], *targets])
        lines.append(f"{sum(line[-1] == 'met' for line in targets)} of {len(targets)} targets met")
        if any(row.status == "FAIL" and row.bench in ("agreement_gpu", "tests") for row in rows):
            lines.append("correctness checks fail: the documents will not report these speeds")
    else:
        lines.append("no row has a target")
    return "\n".join(lines)
