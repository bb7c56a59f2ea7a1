"""Tables of the Macenko benches."""

from __future__ import annotations

from collections.abc import Callable

from macenko_images import SIZES
from record import Row
from records import Loaded, Records
from tables import NOT_MEASURED, P50, SPREAD, TITLE, Column, Table, figure, markdown, number, param, time_of

OWN = ("ernet_fast", "ernet_fast channels-last")
PEERS = ("torchstain torch", "torchstain numpy", "stainx", "torch-staintools", "tiatoolbox")
OPERATIONS = {"normalize": "normalise", "fit": "fit"}


def one_image(records: Records) -> dict[tuple[str, str, str], tuple[Row, Loaded]]:
    """The newest rows of single images, by operation, package and size."""
    return {
        (row.params["operation"], row.params["who"], row.params["size"]): (row, one)
        for row, one in records.newest("cpu").values()
        if row.bench == "bench_macenko" and row.status == "measured" and "who" in row.params
    }


def cell_of(found: tuple[Row, Loaded] | None) -> str:
    """A time, and how many times that of the library in the same record it is."""
    if found is None:
        return "not recorded"
    row, one = found
    if row.params["who"] in OWN:
        return f"**{time_of(row.p50)}**"
    same = {**row.params, "who": OWN[0]}
    own = [other for other in one.rows if other.bench == row.bench and other.params == same]
    return time_of(row.p50) + (f" ({row.p50 / own[0].p50:.3g}x)" if own else "")


def speed(operation: str) -> Callable[[Records], str]:
    """Medians by size and package, beside what the bytes take."""

    def made(records: Records) -> str:
        rows, lines = one_image(records), []
        for who in (*OWN, *PEERS):
            cells = [rows.get((operation, who, size)) for size in SIZES]
            if any(cells):
                lines.append([who, *map(cell_of, cells)])
        own = [rows[operation, OWN[0], size][0] for size in SIZES if (operation, OWN[0], size) in rows]
        if len(own) == len(SIZES):
            lines.append(["bytes / copy bandwidth", *(time_of(row.extra_info["copy_time"]) for row in own)])
            lines.append(["ernet_fast, ns a pixel", *(number(1e6 * row.p50 / row.params["pixels"]) for row in own)])
        head = [f"{OPERATIONS[operation]}, median (times slower)", *(size.replace("x", " x ") for size in SIZES)]
        return markdown(head, lines) if lines else NOT_MEASURED

    return made


def with_param(bench: str, key: str, *columns: Column) -> Table:
    return Table(bench, "", columns, lambda row: key in row.params)


LARGEST = figure("largest difference, grey levels", "largest_difference")
TABLES: dict[str, Callable[[Records], str]] = {
    "macenko-normalize": speed("normalize"),
    "macenko-fit": speed("fit"),
    "macenko-threads": with_param(
        "bench_macenko", "batch", param("threads", "threads"), P50,
        Column("images/s", lambda row: number(64e3 / row.p50)),
    ),
    "macenko-dtypes": with_param("bench_macenko", "dtype", param("dtype", "dtype"), P50, SPREAD),
    "macenko-calls": with_param("bench_macenko", "call", param("call", "call"), P50._replace(head="µs"), SPREAD),
    "macenko-parity": with_param(
        "bench_macenko_parity", "percentile", param("images", "images"),
        Column("how many", lambda row: str(row.repeats)),
        Column("percentile", lambda row: row.params["percentile"]),
        Column("held against", lambda row: row.extra_info["peer"]),
        figure("identical values, worst image", "worst", "{:.3f} %".format),
        Column("median", lambda row: f"{row.p50:.3f} %"), LARGEST,
    ),
    "macenko-others": with_param(
        "bench_macenko_parity", "other", param("package", "other"),
        Column("identical values, median image", lambda row: f"{row.p50:.3f} %"), LARGEST,
    ),
    "macenko-slides": Table(
        "bench_macenko_slide", "",
        (TITLE, Column("measured", lambda row: f"{number(row.p50)} {row.unit}"),
         Column("", lambda row: row.extra_info["detail"])),
    ),
}  # fmt: skip
