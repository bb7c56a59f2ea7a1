"""The figures of ``ernet-fast bench model`` as text and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ernet_fast.benchmark.show import duration, rate
from ernet_fast.console.tables import format_table

HEADER = [
    "", "step", "20 to 80 %", "images/s", "of plain", "peak MiB", "activations", "of plain", "inference", "images/s",
    "of plain",
]  # fmt: skip
MIB = 2.0**20


def model_text(figures: dict[str, Any]) -> str:
    """The table, and who could not be measured."""
    rows = [_cells(row, figures["networks"][0]) for row in figures["networks"]]
    threads = "1 thread" if figures["threads"] == 1 else f"{figures['threads']} threads"
    title = f"{figures['batch']} images of {figures['size']} x {figures['size']}, float32, channels-last, {threads}"
    lines = [title, format_table(HEADER, rows)]
    lines += [f"not measured: {one['name']}: {one['reason']}" for one in figures["missing"]]
    return "\n".join(lines)


def _cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    def share(value: float, other: float) -> str:
        return f"{value / other:.3g}"

    step, inference = row["step"], row.get("inference")
    cells = [
        row["name"], duration(step["p50_ms"]), f"{duration(step['p20_ms'])} to {duration(step['p80_ms'])}",
        rate(row["step_images_per_second"]), share(step["p50_ms"], plain["step"]["p50_ms"]),
        f"{row['peak_bytes'] / MIB:.0f}", f"{row['activation_bytes'] / MIB:.0f}",
        share(row["activation_bytes"], plain["activation_bytes"]),
    ]  # fmt: skip
    if inference is None:
        return [*cells, "-", "-", "-"]
    rest = duration(inference["p50_ms"]), rate(row["inference_images_per_second"])
    return [*cells, *rest, share(inference["p50_ms"], plain["inference"]["p50_ms"])]


PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("training, images/s", lambda row: row["step_images_per_second"]),
    ("peak of activations, MiB", lambda row: row["activation_bytes"] / MIB),
    ("inference, images/s", lambda row: row.get("inference_images_per_second")),
)


def model_figure(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """A matplotlib figure: bars of speed and memory, a panel each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from ernet_fast.train.pictures import INK, MUTED, PALETTE, new_figure, style_axes

    figure = new_figure(10.0, 0.34 * len(rows) + 1.1)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    places = range(len(rows))
    for axes, (label, value_of) in zip(panels, PANELS, strict=True):
        values = [value_of(row) for row in rows]
        colours = [PALETTE[0] if row["key"] in ("er", "lean") else MUTED for row in rows]
        axes.barh(places, [value or 0.0 for value in values], color=colours, height=0.7)
        for place, value in zip(places, values, strict=True):
            shown = "as above" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
            axes.annotate(f" {shown}", (value or 0.0, place), va="center", fontsize=8, color=INK)
        axes.set(title=label, xlim=(0, 1.25 * max(value or 0.0 for value in values)))
        style_axes(axes, grid=False)
    panels[0].set_yticks(places, [row["name"] for row in rows])
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=9, color=INK)
    return figure


def model_picture(figures: dict[str, Any], path: Path) -> None:
    """Draw `model_figure` into a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from ernet_fast.train.pictures import save_figure

    where = figures["machine"]["cpu"]["name"] if figures["device_name"] == "cpu" else figures["device_name"]
    images = f"{figures['batch']} images of {figures['size']} x {figures['size']}"
    title = f"{where}, {figures['threads']} threads, {images}, float32"
    save_figure(model_figure(figures["networks"], title), path)
