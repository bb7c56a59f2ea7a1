"""The tables and the picture of the ER benches.

    python3 bench/report_er.py RECORD [FOLDER]

writes er-benchmarks.md and er_speed.png to the folder (default docs/) from one record; `tables` gives single tables to
other documents. Every figure, means included, is computed from rows; what they lack is said to be not measured.
Nothing is run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from er_means import MEAN_BARS, STAGE_101, geometric_mean, rows_of, settings, with_setting
from er_picture import draw_tails
from record import ROOT, Row, read

BENCHES = ("bench_er_stage",)
BAR_101 = 6.0
BAR_FLOOR = 0.75
NONE = "–"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def number(value: Any, digits: int = 2, factor: float = 1.0) -> str:
    """A figure, or a dash where there is none."""
    return NONE if value is None else f"{factor * value:.{digits}f}"


def mark(value: float | None, bar: float) -> str:
    """A figure with what it has to be, or "not measured"."""
    if value is None:
        return "not measured"
    return f"{value:.2f} ({'reaches' if value >= bar else 'short of'} {bar:g})"


def means_table(rows: Sequence[Row], test: str) -> str:
    """Geometric means over the stages of ResNet-50 for every setting, against the bars."""
    bars = MEAN_BARS[test]
    lines = []
    for setting in settings(rows):
        chosen = with_setting(rows, setting)
        cells = [str(setting)]
        cells += [mark(geometric_mean(chosen, f"{key}"), bar) for key, bar in bars.items()]
        shares = [row.extra_info["share_of_floor"] for row in chosen]
        cells.append(f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %")
        if test == "stage_tails":
            third = [row.extra_info["ratio_naive"] for row in chosen if row.params["stage"] == STAGE_101]
            cells.append(mark(third[0] if third else None, BAR_101))
        lines.append(cells)
    head = ["batch, layout, threads", "times naive eager", "times compiled naive", "share of the floor"]
    return markdown([*head, "ResNet-101, stage 3: times naive eager"] if test == "stage_tails" else head, lines)


def roofline_table(rows: Sequence[Row], compiled_moves: dict[str, float]) -> str:
    """What every row must move, moves, and how long that takes; `compiled_moves` in maps, by stage."""
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info = row.extra_info
            one_map = info["must_move"] / info["map_accesses"]
            moved = [info.get(f"moved_{who}") for who in ("naive", "fused")]
            naive, fused = (None if value is None else value / one_map for value in moved)
            faults = [info.get(f"faults_{who}") for who in ("naive", "fused")]
            lines.append(
                [
                    f"{row.params['stage']}, {setting}",
                    *(number(info.get(f"{who}_ms"), 1) for who in ("naive", "compiled")),
                    number(row.p50, 1),
                    number(info["floor"], 1),
                    f"{100 * info['share_of_floor']:.0f} %",
                    f"{100 * info['share_of_floor_cached']:.0f} %",
                    number(info["must_move"] / row.p50 / 1e6, 0),
                    str(info["map_accesses"]),
                    number(fused, 1),
                    number(naive, 0),
                    number(compiled_moves.get(row.params["stage"]), 0),
                    *(number(value, 0) for value in faults),
                ]
            )
    head = ["stage, batch, layout, threads", "naive, ms", "compiled, ms", "fused, ms", "floor, ms", "share"]
    moves = [
        "in cache",
        "GB/s",
        "maps to move",
        "moved, fused",
        "moved, naive",
        "moved, compiled",
        "faults, naive",
        "faults, fused",
    ]
    return markdown([*head, *moves], lines)


def kernels_table(rows: Sequence[Row]) -> str:
    """Kernels a block, forward + backward, of each stage."""
    lines = []
    for row in rows:
        info, blocks = row.extra_info, row.extra_info["blocks"]
        cells = [row.params["stage"], str(blocks)]
        for who in ("naive", "compiled", "fused"):
            cells += [number(info.get(f"{who}_{kind}_kernels"), 1, 1 / blocks) for kind in ("map", "vector")]
        lines.append(cells)
    names = [f"{who}: {kind}" for who in ("naive", "compiled", "fused") for kind in ("maps", "vectors")]
    return markdown(["stage", "blocks", *names], lines)


def operators_table(rows: Sequence[Row]) -> str:
    """Rates of single operators beside that of a copy."""
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info, params = row.extra_info, row.params
            rates = [number(info[f"{kind}gigabytes_per_second"], 0) for kind in ("", "copy_")]
            share = f"{100 * info['share_of_floor']:.0f} %"
            lines.append([f"{params['operator']}, {params['stage']}, {setting}", number(row.p50), *rates, share])
    return markdown(["operator, stage, batch, layout, threads", "ms", "GB/s", "copy, GB/s", "share of floor"], lines)


def functional_table(rows: Sequence[Row]) -> str:
    """`er_shortcut_sum` by row."""
    lines = []
    for setting in settings(rows):
        for row in with_setting(rows, setting):
            info = row.extra_info
            times = [number(info.get(f"{who}_ms"), 1) for who in ("naive", "compiled", "fused")]
            ratios = [number(info.get(f"ratio_{who}")) for who in ("naive", "compiled")]
            name = f"{row.params['stage']}, {setting}"
            lines.append([name, *times, *ratios, f"{100 * info['share_of_floor']:.0f} %"])
    head = ["stage, batch, layout, threads", "naive, ms", "compiled, ms", "fused, ms", "times naive", "times compiled"]
    return markdown([*head, "share of floor"], lines)


def steps_table(rows: Sequence[Row]) -> str:
    """Training steps or evaluations of whole networks."""
    lines = []
    for row in rows:
        info = row.extra_info
        times = [number(info.get(f"{who}_ms"), 0) for who in ("plain", "naive", "fused")]
        share = info["fused_ms"] / info["plain_ms"]
        cells = [f"ER-ResNet-{row.params['depth']}, batch {row.params['batch']}", *times, number(share)]
        cells.append(number(info["ratio_naive"]))
        bars = [f"{bar} {'reached' if value is not None and bar.met(value) else 'missed'}" for bar, value in row.bars()]
        lines.append([*cells, "; ".join(bars) or NONE])
    head = ["network", "plain, ms", "naive, ms", "fused, ms", "fused / plain", "times naive", "bars"]
    return markdown(head, lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Peaks of training of whole networks: of the process, and of tensors alone."""
    lines = []
    for row in rows:
        info = row.extra_info
        cells = [f"ER-ResNet-{row.params['depth']}, batch {row.params['batch']}"]
        for what in ("peak", "tensors"):
            cells += [number(info.get(f"{what}_{who}"), 0, 2.0**-20) for who in ("plain", "naive", "fused")]
            cells.append(number(info.get(f"{what}_share")))
        lines.append(cells)
    columns = ("plain", "naive", "fused", "fused / plain")
    names = [f"{what}: {who}" for what in ("process", "tensors") for who in columns]
    return markdown(["network, MiB", *names], lines)


def stage_memory_table(rows: Sequence[Row]) -> str:
    """What a stage keeps for backward, and its peak."""
    lines = []
    for row in rows:
        info = row.extra_info
        cells = [
            row.params["stage"],
            *(number(info[f"kept_{who}"], 1, 2.0**-20) for who in ("plain", "naive", "fused")),
        ]
        cells += [number(info["extra_fused"], 0), number(info["extra_vectors"], 0), number(info["extra_per_image"], 0)]
        cells += [number(info["extra_maps_naive"], 1), number(info["peak_share"])]
        lines.append(cells)
    head = ["stage", "plain, MiB", "naive, MiB", "fused, MiB", "fused beyond plain, bytes", "in vectors of C"]
    return markdown([*head, "of these an image", "naive beyond plain, maps", "peak, fused / plain"], lines)


def calls_table(rows: Sequence[Row]) -> str:
    """Calls on tiny maps."""
    lines = [
        [
            row.params["name"],
            number(row.p50, 1),
            number(row.extra_info["add_us"], 1),
            "; ".join(row.bar_texts()) or NONE,
        ]
        for row in rows
    ]
    return markdown(["call", "us", "torch.add beside it, us", "bar"], lines)


TAILS = """Forward + backward of the last BatchNorm, the shortcuts, the sum and the ReLU of every block of a stage, in
the order of a network; an operator that moves no bytes stands for the convolutions. *Compiled* is the naive composition
under `torch.compile`. Geometric means are over the four stages of ResNet-50.

![Milliseconds of the tails of each stage](er_speed.png)"""
ROOFLINE = """The floor is the bytes that the design must move over the copy bandwidth of the same run, measured at the
working set of the pass: the 5 L - 2 maps that forward + backward touch. *In cache* is the same at the working set of
one block, L + 2 maps, as though each block found in the caches what passes over others had left there. Bytes are in
maps of the stage: what must move, and what the operators of each contestant read and write (every argument and result
once an operator; for the compiled ones by Inductor's own count). *Faults* are pages of new maps that the system had to
map and clear in one pass."""
OPERATORS = "Each operator alone, on the maps that the last block of a stage reads."
KERNELS = """Kernels of a block, forward + backward: those that touch a map, and those on vectors of channels; counted
by the profiler, for the compiled composition by Inductor (its loop nests)."""
STAGE_MEMORY = """Bytes of tensors in use after forward of a whole stage, convolutions included, batch 8: what is kept
for backward, and the result. The plain stage has the same convolutions and no ER shortcuts."""
MEMORY = "Peak of a process of its own during training, beyond that of its imports; bar: at most 1.05 times plain."
CALLS = "64 channels of 7 x 7, batch 1, no gradient, one thread."


def report(machine: dict[str, Any], rows: Sequence[Row], source: str) -> str:
    """The page er-benchmarks.md."""
    tails, kernels = rows_of(rows, "stage_tails"), rows_of(rows, "kernels")
    compiled = {
        row.params["stage"]: row.extra_info["moved_compiled"] / row.extra_info["map_bytes"]
        for row in kernels
        if "moved_compiled" in row.extra_info
    }
    parts: list[tuple[str, str, list[Row], Callable[[list[Row]], str]]] = [
        ("Tails of a stage", TAILS, tails, lambda found: means_table(found, "stage_tails")),
        ("Roofline", ROOFLINE, tails, lambda found: roofline_table(found, compiled)),
        ("Operators", OPERATORS, rows_of(rows, "operator"), operators_table),
        ("Kernels", KERNELS, kernels, kernels_table),
        ("`er_shortcut_sum`", "", rows_of(rows, "shortcut_sum"), lambda found: means_table(found, "shortcut_sum")),
        ("`er_shortcut_sum`, by stage", "", rows_of(rows, "shortcut_sum"), functional_table),
        ("Memory of a stage", STAGE_MEMORY, rows_of(rows, "stage_memory"), stage_memory_table),
        ("Training steps", "Float32, channels-last, 224 x 224.", rows_of(rows, "training_step"), steps_table),
        ("Memory of training", MEMORY, rows_of(rows, "training_memory"), memory_table),
        ("Evaluation", "Float32, channels-last, 224 x 224.", rows_of(rows, "evaluation"), steps_table),
        ("One call", CALLS, rows_of(rows, "call"), calls_table),
    ]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    head = f"""# ER shortcuts: benchmarks

Written by `python3 bench/report_er.py` from `{source}`; do not edit. {machine["cpu"]}, {machine["cores"]} cores;
{packages}; commit {machine["commit"]}, {machine["time"][:10]}. Ratios are of medians of contestants that took turns in
one process. Bars: tails at least {BAR_FLOOR:.0%} of the floor; the others stand beside their figures."""
    sections = [head]
    for title, text, found, table in parts:
        sections.append("\n\n".join(filter(None, [f"## {title}", text, table(found) if found else "Not measured."])))
    return "\n\n".join(sections) + "\n"


def er_rows(rows: Iterable[Row]) -> list[Row]:
    """Those of the ER benches that have figures."""
    return [row for row in rows if row.bench.startswith("bench_er_") and row.status in ("measured", "pass")]


def tables(records: Any) -> dict[str, str]:
    """Tables for other documents, from the newest rows of all records."""
    rows = er_rows(records.rows("cpu"))
    tails, kernels = rows_of(rows, "stage_tails"), rows_of(rows, "kernels")
    return {
        "er-kernels": kernels_table(kernels) if kernels else "Not measured.",
        "er-means": means_table(tails, "stage_tails") if tails else "Not measured.",
    }


def write_report(record: Path, folder: Path = ROOT / "docs") -> list[Path]:
    """Write the page and the picture of one record; returns their paths."""
    machine, rows = read(record)
    rows = er_rows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "er-benchmarks.md"
    page.write_text(report(machine, rows, f"bench/results/{record.name}"))
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
