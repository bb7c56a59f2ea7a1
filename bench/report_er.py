"""The page and the picture of the ER benches.

    python3 bench/report_er.py RECORD [FOLDER]

writes er-benchmarks.md and er_speed.png to the folder (default docs/). Rows are those of the record; what it lacks is
taken from older records beside it, of the same kind of machine, and marked. `tables` gives single tables to other
documents. What no record has is said to be not measured. Nothing is run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from er_means import rows_of
from er_picture import BATCH, LAYOUT, draw_tails
from er_tables import (
    OLDER,
    bytes_table,
    calls_table,
    kernels_table,
    means_table,
    memory_table,
    norms_table,
    operators_of_tails_table,
    operators_table,
    speed_table,
    stage_memory_table,
    steps_table,
    targets_table,
)
from record import ROOT, Row, read

FOLDER = Path(__file__).resolve().parent
BENCHES = ("bench_er_stage",)
Table = Callable[[list[Row]], str]

TAILS = """Forward + backward of the last BatchNorm, the shortcuts, the sum and the ReLU of every block of a stage, in
the order of a network; an operator that moves no bytes stands for the convolutions. *Compiled* is the naive composition
under `torch.compile`. Geometric means are over the four stages of ResNet-50.

![Milliseconds of the tails of each stage](er_speed.png)"""
SPEED = """*At copy bandwidth* is the bytes that the design must move over the copy bandwidth of the same run,
measured at the working set of the pass: the 4 L - 1 maps that forward + backward touch. It is no floor: a share
above 100 % says that caches held some of the bytes from one pass to the next. GB/s are the bytes to move
over the time."""
BYTES = """In maps of the stage: what must move, and what the operators of each contestant read and write (every
argument and result once an operator, also where it passes over a map twice, as the fused ones do channels-last; for the
compiled ones Inductor's own count). *Faults* are pages of new maps that
the system had to map and clear in one pass."""
PARTS = """Milliseconds within the operators, by the profiler, while the fused pass runs alone, again and again; the
rest is Python, autograd and allocation, and what the profiler itself costs."""
OPERATORS = "Each operator alone, on the maps that the last block of a stage reads, beside a copy of as many bytes."
KERNELS = """Kernels of a block, forward + backward: those that touch a map, and those on vectors of channels; counted
by the profiler, for the compiled composition by Inductor (its loop nests)."""
CALLS_OF_SUM = """Forward + backward of one call with ReLU on as many maps as the last block of the stage reads. Each
call is on its own: it takes the moments of all maps, and writes a gradient for each."""
NORMS = """Forward + backward of all BatchNorms of ER-ResNet-50 that no ER block ends with, one after the other: with
the ReLU behind them, and a projection block's two with their sum and ReLU; against the same by PyTorch's modules."""
STAGE_MEMORY = """Bytes of tensors in use after forward of a whole stage, convolutions included, batch 8: what is kept
for backward, and the result. The plain stage has the same convolutions and no ER shortcuts."""
IMAGES = "Float32, channels-last, 224 x 224, all cores; the plain ResNet is one of torch modules."
MEMORY = """Peak of a process of its own during training, beyond that of its imports, and of tensors alone (parameters,
gradients and the optimizer's state included)."""
CALLS = "64 channels of 7 x 7, batch 1, three maps, no gradient, one thread."


class Source(NamedTuple):
    """A record that rows of the page are from."""

    path: Path
    machine: dict[str, Any]
    count: int


def er_rows(rows: Iterable[Row]) -> list[Row]:
    """Those of the ER benches on the CPU that have figures."""
    return [
        row
        for row in rows
        if row.bench.startswith("bench_er_")
        and (FOLDER / f"{row.bench}.py").exists()
        and row.status in ("measured", "pass")
    ]


def gather(record: Path) -> tuple[list[Row], list[Source]]:
    """The rows of the record, and those that only older records beside it have, marked; and where they are from."""
    machine, rows = read(record)
    found = {row.key: row for row in er_rows(rows)}
    sources = [Source(record, machine, len(found))]
    others = [(path, *read(path)) for path in record.parent.glob("*.json") if path.name != record.name]
    for path, other, rows in sorted(others, key=lambda entry: entry[1]["time"], reverse=True):
        if other["time"] > machine["time"] or any(other[key] != machine[key] for key in ("kind", "cpu", "cores")):
            continue
        lacking = [row for row in er_rows(rows) if row.key not in found]
        for row in lacking:
            row.extra_info[OLDER] = True
            found[row.key] = row
        if lacking:
            sources.append(Source(path, other, len(lacking)))
    return list(found.values()), sources


def in_maps(kernels: Iterable[Row]) -> dict[str, float]:
    """What compiled tails move, in maps, by stage."""
    return {
        row.params["stage"]: row.extra_info["moved_compiled"] / row.extra_info["map_bytes"]
        for row in kernels
        if "moved_compiled" in row.extra_info
    }


def sections(rows: Sequence[Row]) -> list[tuple[str, str, list[Row], Table]]:
    """Title, text, rows and table of each section."""
    tails, kernels, sums = (rows_of(rows, test) for test in ("stage_tails", "kernels", "shortcut_sum"))
    compiled = in_maps(kernels)
    return [
        ("Tails of a stage", TAILS, tails, lambda found: means_table(found, "stage_tails")),
        ("Tails, by stage", SPEED, tails, speed_table),
        ("Bytes of the tails", BYTES, tails, lambda found: bytes_table(found, compiled)),
        ("Time of the fused tails", PARTS, tails, operators_of_tails_table),
        ("Kernels of the tails", KERNELS, kernels, kernels_table),
        ("Operators", OPERATORS, rows_of(rows, "operator"), operators_table),
        ("`er_shortcut_sum`", CALLS_OF_SUM, sums, lambda found: means_table(found, "shortcut_sum")),
        ("`er_shortcut_sum`, by stage", "", sums, speed_table),
        ("BatchNorm and ReLU", NORMS, rows_of(rows, "norms"), norms_table),
        ("Memory of a stage", STAGE_MEMORY, rows_of(rows, "stage_memory"), stage_memory_table),
        ("Training steps", IMAGES, rows_of(rows, "training_step"), steps_table),
        ("Memory of training", MEMORY, rows_of(rows, "training_memory"), memory_table),
        ("Evaluation", IMAGES, rows_of(rows, "evaluation"), steps_table),
        ("One call", CALLS, rows_of(rows, "call"), calls_table),
        ("Targets", "", [row for row in rows if row.target_texts()], targets_table),
    ]


def origin(sources: Sequence[Source]) -> str:
    """Which records the page is from."""
    lines = []
    for path, machine, count in sources:
        changed = " and uncommitted changes" if machine["dirty"] else ""
        link = f"[{path.name}](../bench/results/{path.name})"
        lines.append(f"{link} (commit {machine['commit']}{changed}, {machine['time'][:10]}, {count} rows)")
    older = f" A star marks rows of older records: {'; '.join(lines[1:])}." if len(lines) > 1 else ""
    return f"{lines[0]}; do not edit.{older}"


def report(rows: Sequence[Row], sources: Sequence[Source]) -> str:
    """The page er-benchmarks.md."""
    machine = sources[0].machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    parts = [
        "# ER shortcuts: benchmarks",
        f"Written by `python3 dev.py report` from {origin(sources)}\n\n{machine['cpu']}, {machine['cores']} cores; "
        f"{packages}. Ratios are of medians of contestants interleaved in one process. What each row is, and how "
        "its bytes are counted, stands in `bench/bench_er_*.py`; [er-shortcuts.md](er-shortcuts.md) has the design.",
    ]
    for title, text, found, table in sections(rows):
        parts.append("\n\n".join(filter(None, [f"## {title}", text, table(found) if found else "Not measured."])))
    return "\n\n".join(parts) + "\n"


def tables(records: Any) -> dict[str, str]:
    """Tables for other documents, from the newest rows of all records."""
    rows = er_rows(records.rows("cpu"))
    tails, kernels = rows_of(rows, "stage_tails"), rows_of(rows, "kernels")
    memory = rows_of(rows, "stage_memory")
    chosen = [row for row in tails if (row.params["batch"], row.params["layout"]) == (BATCH, LAYOUT)]
    return {
        "er-kernels": kernels_table(kernels) if kernels else "Not measured.",
        "er-parts": operators_of_tails_table(chosen) if chosen else "Not measured.",
        "er-means": means_table(tails, "stage_tails") if tails else "Not measured.",
        "er-stage-memory": stage_memory_table(memory) if memory else "Not measured.",
    }


def write_report(record: Path, folder: Path = ROOT / "docs") -> list[Path]:
    """Write the page and the picture of one record; returns their paths."""
    rows, sources = gather(record)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "er-benchmarks.md"
    page.write_text(report(rows, sources))
    tails = rows_of(rows, "stage_tails")
    return [page, draw_tails(tails, folder / "er_speed.png")] if tails else [page]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of one record."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) not in (1, 2):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    for path in write_report(*map(Path, given)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
