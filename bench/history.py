"""How the figures moved from record to record: a picture, or a table where matplotlib is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from record import MORE_IS_BETTER, RESULTS, Row
from records import Loaded, Records
from tables import columns

MOST = 12  # lines that can be told apart


def series(names: Sequence[str], folder: Path = RESULTS) -> dict[str, list[tuple[Loaded, Row]]]:
    """machine and row -> its measurements, oldest first: those whose bench or name has one of `names` in it.

    Without names, the rows that have a target.
    """
    found: dict[str, list[tuple[Loaded, Row]]] = {}
    for one in reversed(Records(folder).all):
        for row in one.rows:
            wanted = any(name in f"{row.bench} {row.name}" for name in names) if names else bool(row.target_texts())
            if wanted and row.status == "measured" and row.p50 > 0:
                found.setdefault(f"{one.machine['name']}: {row.name}", []).append((one, row))
    return found


def times_better(points: Sequence[tuple[Loaded, Row]]) -> list[float]:
    """Each measurement against the first: above 1 is better."""
    first = points[0][1]
    more = first.unit in MORE_IS_BETTER
    return [row.p50 / first.p50 if more else first.p50 / row.p50 for _, row in points]


def as_text(found: dict[str, list[tuple[Loaded, Row]]]) -> str:
    lines = [["row", "first", "then, times better than the first"]]
    for name, points in found.items():
        (first, row), *_ = points
        commits = [one.machine["commit"] for one, _ in points]
        later = [f"{ratio:.2f} ({commit})" for ratio, commit in zip(times_better(points), commits, strict=True)][1:]
        lines.append([name, f"{row.p50:.4g} {row.unit} ({first.machine['commit']})", ", ".join(later)])
    return "\n".join(columns(lines))


def draw(found: dict[str, list[tuple[Loaded, Row]]], path: Path) -> None:
    """Times better than in the first record, one line a row; those that moved most."""
    from matplotlib.figure import Figure

    def label(one: Loaded) -> str:
        return f"{one.machine['time'][:10]}\n{one.machine['commit']}"

    records = {one.path: one for points in found.values() for one, _ in points}
    labels = [label(one) for one in sorted(records.values(), key=lambda one: one.machine["time"])]
    moved = sorted(found.items(), key=lambda item: -max(abs(1 - ratio) for ratio in times_better(item[1])))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in moved[:MOST]:
        where = [labels.index(label(one)) for one, _ in points]
        axes.plot(where, times_better(points), marker="o", linewidth=1.5, label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(yscale="log", ylabel="times better than in the first record")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def history(names: Sequence[str], path: Path, folder: Path = RESULTS) -> int:
    """Print the table and, where matplotlib is installed, draw the picture; exit code 1 if there is nothing to show."""
    found = series(names, folder)
    if not found:
        print(f"no row of {folder} {'has ' + ' or '.join(names) if names else 'has a target'}")
        return 1
    print(as_text(found))
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed, so there is no picture")
    else:
        draw(found, path)
        print(f"picture: {path}")
    return 0
