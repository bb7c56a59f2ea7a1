"""Tables of the Macenko benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from macenko_images import SIZES
from measured import key_of
from record import Row
from records import Loaded, Records, newest_of
from tables import (
    NOT_MEASURED,
    P50,
    SPREAD,
    TARGETS,
    TITLE,
    Column,
    Table,
    cpu_name,
    figure,
    markdown,
    number,
    param,
    starred,
    time_of,
    verdicts,
)

OWN = ("ernet_fast", "ernet_fast channels-last")
PEERS = ("torchstain torch", "torchstain numpy", "stainx", "torch-staintools", "tiatoolbox")
OPERATIONS = {"normalize": "normalise", "fit": "fit"}
NOT_RECORDED = "not recorded"
SHOWN_SIZES = [size.replace("x", " x ") for size in SIZES]
Found = tuple[Row, Loaded]
OneImage = Mapping[tuple[str, str, str], Found]


def one_image(records: list[Loaded]) -> OneImage:
    """The newest rows of single images, by operation, package and size."""
    return {
        (row.params["operation"], row.params["who"], row.params["size"]): (row, one)
        for row, one in newest_of(records).values()
        if row.bench == "bench_macenko" and row.status == "measured" and "who" in row.params
    }


def by_cpu(records: Records, lines: Callable[[OneImage], list[list[str]]], width: int) -> list[list[str]]:
    """The lines of each CPU, below its name; CPUs without any are left out."""
    found = []
    for group in records.cpus():
        rows = one_image(group)
        mine = lines(rows)
        if mine:
            isa = next((row.extra_info["isa"] for row, _ in rows.values() if "isa" in row.extra_info), None)
            name = f"**{cpu_name(group[0].machine, isa)}**, {group[0].machine['time'][:10]}"
            found += [[name, *[""] * (width - 1)], *mine]
    return found


def own_of(found: Found) -> Row | None:
    """The library's row of the same operation and size in the same record."""
    row, one = found
    same = {**row.params, "who": OWN[0]}
    return next((other for other in one.rows if other.bench == row.bench and other.params == same), None)


def time_cell(found: Found | None) -> str:
    """The median over the images, and the worst."""
    if found is None:
        return NOT_RECORDED
    row, _ = found
    worst = row.extra_info.get("max")
    return starred(f"**{time_of(row.p50)}**; {NOT_RECORDED if worst is None else time_of(worst)}", row)


def ratios_of(found: Found | None) -> str:
    """How many times as long as the library in the same record: the median of the images' ratios, and the least."""
    own = found and own_of(found)
    if found is None or own is None:
        return NOT_RECORDED
    key = key_of(found[0].params["who"])
    middle = own.extra_info.get(f"ratio_{key}", found[0].p50 / own.p50)
    worst = own.extra_info.get(f"worst_ratio_{key}")
    return f"{middle:.3g}x; {NOT_RECORDED if worst is None else f'{worst:.3g}x'}"


def peer_cell(found: Found | None) -> str:
    if found is None:
        return NOT_RECORDED
    images, own = found[0].extra_info.get("images"), own_of(found)
    fewer = images is not None and own is not None and images < own.extra_info.get("images", images)
    of = f" ({images} images)" if fewer else ""
    return starred(f"{time_of(found[0].p50)}: {ratios_of(found)}{of}", found[0])


def images_cell(found: Found | None) -> str:
    """How many images, and of what kind."""
    if found is None:
        return NOT_RECORDED
    info = found[0].extra_info
    if "images" not in info:
        return "one"  # as all records of before
    origin = info.get("images_from", "")
    kind = "generated" if "generated" in origin else "real, some mirrored" if "mirrored" in origin else "real"
    return f"{info['images']} {kind}"


def speed(operation: str) -> Callable[[Records], str]:
    """Median and worst by size and package, a block a CPU, beside what the bytes take."""

    def lines(rows: OneImage) -> list[list[str]]:
        def cells(who: str, cell: Callable[[Found | None], str]) -> list[str]:
            return [cell(rows.get((operation, who, size))) for size in SIZES]

        def figure_of(value: Callable[[Row], str]) -> Callable[[Found | None], str]:
            return lambda found: value(found[0]) if found else NOT_RECORDED

        known = [who for who in (*OWN, *PEERS) if any((operation, who, size) in rows for size in SIZES)]
        if OWN[0] not in known:
            return []
        return [
            ["images", *cells(OWN[0], images_cell)],
            *([who, *cells(who, time_cell if who in OWN else peer_cell)] for who in known),
            ["bytes / copy bandwidth", *cells(OWN[0], figure_of(lambda row: time_of(row.extra_info.get("copy_time"))))],
            [
                "ernet_fast, ns a pixel",
                *cells(OWN[0], figure_of(lambda row: number(1e6 * row.p50 / row.params["pixels"]))),
            ],
        ]

    def made(records: Records) -> str:
        head = [f"{OPERATIONS[operation]}: median; worst image. Others: median: times slower; least", *SHOWN_SIZES]
        found = by_cpu(records, lines, len(head))
        return markdown(head, found) if found else NOT_MEASURED

    return made


def readme(records: Records) -> str:
    """Both operations against both backends of torchstain, a block a CPU."""

    def lines(rows: OneImage) -> list[list[str]]:
        found = []
        for operation, word in OPERATIONS.items():
            own = [rows.get((operation, OWN[0], size)) for size in SIZES]
            if any(own):
                found += [["images", *map(images_cell, own)]] if not found else []
                found.append([word, *map(time_cell, own)])
            for who in PEERS[:2]:
                theirs = [rows.get((operation, who, size)) for size in SIZES]
                if any(theirs):
                    found.append([f"{word}, times as fast as {who}", *map(ratios_of, theirs)])
        return found

    head = ["median; worst image", *SHOWN_SIZES]
    found = by_cpu(records, lines, len(head))
    return markdown(head, found) if found else NOT_MEASURED


def instruction_sets(records: Records) -> str:
    """224 x 224 by each instruction set, over the images, on every CPU."""
    ratio_head = "times as fast as torchstain torch: median; worst"
    head = ["normalise 224 x 224", "median", "90 %", "99 %", "worst image", ratio_head, "targets"]
    lines = []
    for group in records.cpus():
        found = [row for row, _ in newest_of(group).values() if row.bench == "bench_macenko" and "isa" in row.params]
        for row in found:
            info = row.extra_info
            ratio = [number(info.get(f"{key}ratio_torchstain_torch")) for key in ("", "worst_")]
            name = starred(f"{cpu_name(group[0].machine, row.params['isa'])}, {info['images']} images", row)
            times = [time_of(value) for value in (row.p50, info["p90"], info["p99"], info["max"])]
            lines.append([name, *times, "; ".join(ratio), verdicts(row)])
    return markdown(head, lines) if lines else NOT_MEASURED


def with_param(bench: str, key: str, *columns: Column) -> Table:
    return Table(bench, "", columns, lambda row: key in row.params)


LARGEST = figure("largest difference, grey levels", "largest_difference")
WORST = figure("worst image", "max")
TABLES: dict[str, Callable[[Records], str]] = {
    "macenko-normalize": speed("normalize"),
    "macenko-fit": speed("fit"),
    "readme-macenko": readme,
    "macenko-isa": instruction_sets,
    "macenko-adversarial": with_param(
        "bench_macenko", "adversarial", param("images", "adversarial"), P50, WORST,
        figure("common images, median", "peer_p50"), figure("worst of them / that", "max_of_common"), TARGETS,
    ),
    "macenko-threads": with_param(
        "bench_macenko", "batch", param("threads", "threads"), P50,
        Column("images/s", lambda row: number(64e3 / row.p50)),
    ),
    "macenko-dtypes": with_param(
        "bench_macenko", "dtype", param("dtype", "dtype"), P50, WORST,
        figure("times uint8, median", "times_uint8"), figure("worst image", "worst_times_uint8"), TARGETS,
    ),
    "macenko-calls": with_param(
        "bench_macenko", "call", param("call", "call"), P50._replace(head="µs"), SPREAD, WORST, TARGETS,
    ),
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
