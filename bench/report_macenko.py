"""Tables and a picture from a record of the Macenko benches.

`python3 dev.py report` calls it; alone,

    python bench/report_macenko.py RECORD [DOCS]

writes DOCS/macenko-benchmarks.md and DOCS/macenko_speed.png (docs/ by default). Every figure comes from the record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from record import Row, read

OWN = ("ernet_fast", "ernet_fast channels-last")
PEERS = ("torchstain torch", "torchstain numpy", "stainx", "torch-staintools", "tiatoolbox")
BENCHES = ("bench_macenko", "bench_macenko_parity", "bench_macenko_slide")
OPERATIONS = {"normalize": "Normalise", "fit": "Fit"}
# Okabe and Ito's colours, which people with any colour vision tell apart; lines that coincide differ in their dashes.
STYLES = {
    "ernet_fast": {"color": "#000000", "marker": "o", "linewidth": 2.5},
    "torchstain torch": {"color": "#0072B2", "marker": "s", "linewidth": 3},
    "torchstain numpy": {"color": "#E69F00", "marker": "^", "linewidth": 1.5},
    "stainx": {"color": "#56B4E9", "marker": "v", "linewidth": 1.5, "linestyle": "--"},
    "torch-staintools": {"color": "#D55E00", "marker": "D", "linewidth": 1.5},
    "tiatoolbox": {"color": "#CC79A7", "marker": "P", "linewidth": 1.5},
}
PICTURE = "macenko_speed.png"


def images_per_second(row: Row) -> float:
    """Images a second of a row of one image in milliseconds."""
    return 1e3 / row.p50


def of_operation(rows: Sequence[Row], operation: str) -> list[Row]:
    """Rows of one image of `operation`, by size."""
    found = [row for row in rows if row.bench == "bench_macenko" and "who" in row.params]
    return sorted((row for row in found if row.params["operation"] == operation), key=lambda row: row.params["pixels"])


def picture(rows: Sequence[Row], path: Path, machine: dict[str, Any]) -> None:
    """Images a second against pixels, a panel an operation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5.6), sharey=True, layout="constrained")
    for panel, (operation, title) in zip(panels, OPERATIONS.items(), strict=True):
        found = of_operation(rows, operation)
        sizes = sorted({(row.params["pixels"], row.params["size"]) for row in found})
        for who, style in STYLES.items():
            mine = [row for row in found if row.params["who"] == who]
            panel.plot(
                [row.params["pixels"] for row in mine],
                [images_per_second(row) for row in mine],
                markersize=6,
                label=who if mine else f"{who}: not installed",
                **style,
            )
        least = [row for row in found if row.params["who"] == OWN[0]]
        panel.plot(
            [row.params["pixels"] for row in least], [1e3 / row.extra_info["copy_time"] for row in least],
            color="grey", linestyle="--", linewidth=1.3, label="limit: bytes / copy bandwidth",
        )  # fmt: skip
        panel.set(xscale="log", yscale="log", title=f"{title} one image, one thread", xlabel="image size (pixels)")
        panel.set_xticks([pixels for pixels, _ in sizes], [name.replace("x", "×") for _, name in sizes], fontsize=9)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("images per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Macenko on one core ({machine['cpu']}), every package interleaved in one run", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def speed_table(rows: Sequence[Row], operation: str) -> str:
    """Median milliseconds by size and package, and how many times faster ernet_fast is."""
    found = of_operation(rows, operation)
    sizes = list(dict.fromkeys(row.params["size"] for row in found))
    by = {(row.params["who"], row.params["size"]): row for row in found}
    lines = []
    for who in [*OWN, *PEERS]:
        cells = [who]
        for size in sizes:
            row, own = by.get((who, size)), by.get((OWN[0], size))
            if row is None or own is None:
                cells.append("not installed")
            elif who in OWN:
                cells.append(f"**{number(row.p50)}** ({number(row.p20)} to {number(row.p80)})")
            else:
                cells.append(f"{number(row.p50)} ({number(row.p50 / own.p50)} ×)")
        lines.append(cells)
    limit = [number(by[OWN[0], size].extra_info["copy_time"]) for size in sizes]
    lines.append(["limit: bytes / copy bandwidth", *limit])
    pixels = [by[OWN[0], size].params["pixels"] for size in sizes]
    each = [number(1e6 * by[OWN[0], size].p50 / count) for size, count in zip(sizes, pixels, strict=True)]
    lines.append(["ernet_fast, ns a pixel", *each])
    return table(["ms (median; times slower)", *sizes], lines)


def targets_table(rows: Sequence[Row]) -> str:
    """Every target, with the number found."""
    lines = []
    for row in rows:
        for target, value in row.targets():
            met = "not measured" if value is None else "yes" if target.met(value) else "**no**"
            lines.append(
                [
                    str(row.extra_info.get("title", row.name)),
                    f"{target.key} {target.sense} {target.limit:g}",
                    "" if value is None else f"{value:.5g}",
                    met,
                ]
            )
    return table(["row", "target", "found", "reached"], lines)


def other_tables(rows: Sequence[Row]) -> list[str]:
    """Threads, overhead, parity and slides."""
    threads = [row for row in rows if row.group == "normalize 64 x 224x224"]
    dtypes = [row for row in rows if "dtype" in row.params]
    calls = [row for row in rows if row.unit == "us"]
    parity = [row for row in rows if row.bench == "bench_macenko_parity" and "percentile" in row.params]
    others = [row for row in rows if row.bench == "bench_macenko_parity" and "other" in row.params]
    slides = [row for row in rows if row.bench == "bench_macenko_slide"]
    parts = []
    if threads:
        lines = [[str(row.params["threads"]), number(row.p50), number(64e3 / row.p50)] for row in threads]
        parts += ["## A batch of 64 images of 224x224", table(["threads", "ms", "images/s"], lines)]
    if dtypes:
        lines = [[row.params["dtype"], f"{number(row.p50)} ({number(row.p20)} to {number(row.p80)})"] for row in dtypes]
        parts += ["## Normalise 224x224 by dtype, one thread", table(["dtype", "ms (20th to 80th percentile)"], lines)]
    if calls:
        lines = [[row.params["call"], f"{number(row.p50)} ({number(row.p20)} to {number(row.p80)})"] for row in calls]
        parts += ["## A whole call on 64x64 pixels, one thread", table(["call", "µs (20th to 80th percentile)"], lines)]
    if parity:
        lines = [
            [f"{row.params['images']}, {row.repeats} images", f"{row.params['percentile']}: {row.extra_info['peer']}",
             f"{row.extra_info['worst']:.3f} %", f"{row.p50:.3f} %", str(row.extra_info["largest_difference"])]
            for row in parity
        ]  # fmt: skip
        head = ["images", "percentile: held against", "identical values, worst image", "median", "largest difference"]
        parts += ["## Parity with torchstain on real images", table(head, lines)]
    if others:
        lines = [[row.params["other"], f"{row.p50:.3f} %", str(row.extra_info["largest_difference"])] for row in others]
        head = ["package", "identical values, median image", "largest difference, grey levels"]
        parts += [
            f"## The same {others[0].repeats} images of {others[0].params['images']} by other packages",
            "Each fitted to the same target; [what they do otherwise](macenko.md#what-macenko-means-elsewhere).",
            table(head, lines),
        ]  # fmt: skip
    if slides:
        lines = [
            [str(row.extra_info["title"]), f"{number(row.p50)} {row.unit}", row.extra_info["detail"]] for row in slides
        ]
        parts += ["## Whole slides", table(["", "measured", ""], lines)]
    return parts


def report(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """The page."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    parts = [
        "# Macenko on the CPU: benchmarks",
        f"Written by `python3 dev.py report` from a record of {machine['time'][:10]}, commit "
        f"`{machine['commit']}`: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python "
        f"{machine['python']}, {packages}. `bench/bench_macenko*.py` say what each row is, "
        "`ernet_fast/benchmark/macenko_peers.py` how the peers are installed.",
        f"![Images per second against size]({PICTURE})",
    ]
    for operation, title in OPERATIONS.items():
        parts += [f"## {title} one image, one thread", speed_table(rows, operation)]
    parts += [
        "The limit is the time in which as many bytes are copied: the image read once and, for normalisation, the "
        "result written once. An exact fit has to read the image at least three times, for the moments, the angles "
        "and the concentrations, each of which needs the one before; it is bound by arithmetic, not by these bytes.",
        *other_tables(rows),
        "## Targets",
        targets_table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the page and the picture."""
    if len(arguments) not in (1, 2):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    docs = Path(arguments[1]) if len(arguments) == 2 else Path(__file__).resolve().parent.parent / "docs"
    machine, rows = read(Path(arguments[0]))
    rows = [row for row in rows if row.bench in BENCHES]
    if not of_operation(rows, "normalize"):
        print(f"{arguments[0]} holds no rows of bench_macenko. Run: python3 dev.py bench bench/bench_macenko.py",
              file=sys.stderr)  # fmt: skip
        return 1
    picture(rows, docs / PICTURE, machine)
    (docs / "macenko-benchmarks.md").write_text(report(machine, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
