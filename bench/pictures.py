"""The pictures of the documents, drawn from rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from er_tables import EPILOGUES, by_setting, typical
from macenko_tables import OPERATIONS, OWN, one_image
from model_tables import PICTURES as OF_MODELS
from record import Row
from records import Records
from tables import cpu_name

BARS = (
    ("naive_ms", "naive, eager", "#b8b8b8"),
    ("compiled_ms", "naive, torch.compile", "#7a9cc6"),
    ("fused_ms", "fused", "#1f4e79"),
)
# Okabe and Ito's colours, which people with any colour vision tell apart; lines that coincide differ in their dashes.
STYLES = {
    "ernet_fast": {"color": "#000000", "marker": "o", "linewidth": 2.5},
    "torchstain torch": {"color": "#0072B2", "marker": "s", "linewidth": 3},
    "torchstain numpy": {"color": "#E69F00", "marker": "^", "linewidth": 1.5},
    "stainx": {"color": "#56B4E9", "marker": "v", "linewidth": 1.5, "linestyle": "--"},
    "torch-staintools": {"color": "#D55E00", "marker": "D", "linewidth": 1.5},
    "tiatoolbox": {"color": "#CC79A7", "marker": "P", "linewidth": 1.5},
}


def epilogues(records: Records) -> Any:
    """Bars of the block epilogues of every stage, batch 8, channels-last; a panel for each number of threads."""
    from matplotlib.figure import Figure

    rows = sorted(filter(typical, records.rows("cpu", *EPILOGUES)), key=by_setting)
    threads = sorted({row.params["threads"] for row in rows})
    figure = Figure(figsize=(5.2 * len(threads), 4.2), layout="constrained")
    panels = figure.subplots(1, len(threads), squeeze=False, sharey=True)[0]
    for panel, count in zip(panels, threads, strict=True):
        _bars(panel, [row for row in rows if row.params["threads"] == count])
        panel.set_title(f"{count} thread{'s' * (count > 1)}", loc="left", fontsize=11)
    panels[0].set_ylabel("ms, forward + backward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("block epilogues of a stage, batch 8, channels-last, float32, logarithmic scale", fontsize=8)
    return figure


def _bars(panel: Any, rows: list[Row]) -> None:
    """Groups of bars, one a stage; numbers over the bars."""
    width = 0.27
    for place, (key, label, colour) in enumerate(BARS):
        known = [(index, row.extra_info[key]) for index, row in enumerate(rows) if key in row.extra_info]
        heights = [height for _, height in known]
        bars = panel.bar(
            [index + (place - 1) * width for index, _ in known], heights, width * 0.94, label=label, color=colour
        )
        texts = [f"{height:.0f}" if height >= 100 else f"{height:.3g}" for height in heights]
        for text in panel.bar_label(bars, texts, fontsize=7, padding=1, zorder=3):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4})
    places, copied = range(len(rows)), [row.extra_info["copy_time"] for row in rows]
    ends = [place - 1.5 * width for place in places], [place + 1.5 * width for place in places]
    panel.hlines(copied, *ends, color="#d1495b", linewidth=1.8, label="bytes / copy bandwidth")
    panel.set_yscale("log")
    panel.margins(y=0.12)
    names = [row.params["stage"].replace("resnet", "ResNet-").rpartition("-") for row in rows]
    panel.set_xticks(places, [f"{network}\nstage {stage}" for network, _, stage in names], fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="x", length=0)


def macenko(records: Records) -> Any:
    """Images a second against pixels, a panel an operation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(1, len(OPERATIONS), sharey=True)
    for panel, operation in zip(panels, OPERATIONS, strict=True):
        found = [row for (what, *_), (row, _) in one_image(records.of("cpu")).items() if what == operation]
        found.sort(key=lambda row: row.params["pixels"])
        for who, style in STYLES.items():
            mine = [row for row in found if row.params["who"] == who]
            label = who if mine else f"{who}: not installed"
            panel.plot(_pixels(mine), [1e3 / row.p50 for row in mine], markersize=6, label=label, **style)
        own = [row for row in found if row.params["who"] == OWN[0]]
        limit, style = [1e3 / row.extra_info["copy_time"] for row in own], {"color": "grey", "linestyle": "--"}
        panel.plot(_pixels(own), limit, linewidth=1.3, label="limit: bytes / copy bandwidth", **style)
        title = f"{OPERATIONS[operation].capitalize()} one image, one thread"
        panel.set(xscale="log", yscale="log", title=title, xlabel="image size (pixels)")
        panel.set_xticks(_pixels(own), [row.params["size"].replace("x", "×") for row in own], fontsize=9)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("images per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    cpu = cpu_name(records.of("cpu")[0].machine)
    many = any("images" in row.extra_info for row, _ in one_image(records.of("cpu")).values())
    what = "medians over many images" if many else "one image"
    figure.suptitle(f"Macenko on one core ({cpu}), {what}, interleaved in one run", fontsize=10)
    return figure


def _pixels(rows: list[Row]) -> list[int]:
    return [row.params["pixels"] for row in rows]


PICTURES: dict[str, Callable[[Records], Any]] = {"er_speed.png": epilogues, "macenko_speed.png": macenko, **OF_MODELS}
"""A picture is made of records, or None where they have nothing for it."""


def missing(records: Records, folder: Path) -> list[Path]:
    """The pictures that there is something for, and that are not there."""
    return [folder / name for name, make in PICTURES.items() if not (folder / name).exists() and make(records)]


def draw(records: Records, folder: Path) -> list[Path]:
    """Draw all pictures; returns those that are not what they were."""
    changed = []
    for name, make in PICTURES.items():
        path, figure = folder / name, make(records)
        if figure is None:
            continue
        before = path.read_bytes() if path.exists() else b""
        figure.savefig(path, dpi=110, metadata={"Software": None})
        changed += [path] if path.read_bytes() != before else []
    return changed
