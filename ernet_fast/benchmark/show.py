"""The figures of ``ernet-fast bench`` as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernet_fast.console.tables import format_table

HEADER = ["", "median", "20 to 80 %", "per second", "times slower", "result"]
IMAGES_HEADER = ["", "images", "median", "90 %", "99 %", "worst", "per second", "times slower", "at least", "result"]


def duration(milliseconds: float) -> str:
    """Three significant digits, in s, ms or us."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1000 * milliseconds:.3g} us"


def rate(per_second: float) -> str:
    """Three significant digits, thousands with a k."""
    return f"{per_second / 1000:.3g} k" if per_second >= 1000 else f"{per_second:.3g}"


def answer_text(answer: dict[str, Any]) -> str:
    """One question's table, and who could not be measured."""
    over_images = "images" in answer["figures"][0]
    cells = _cells_over_images if over_images else _cells
    rows = [
        [
            figure["name"] + (f" {figure['version']}" if figure["version"] else ""),
            *cells(figure, number == 0),
            "same" if figure["same_result"] else "another *",
        ]
        for number, figure in enumerate(answer["figures"])
    ]
    threads = "1 thread" if answer["threads"] == 1 else f"{answer['threads']} threads"
    lines = [f"{answer['title']} ({threads})", format_table(IMAGES_HEADER if over_images else HEADER, rows)]
    lines += [f"* {one['name']}: {one['agreement']}" for one in answer["figures"] if not one["same_result"]]
    lines += [f"not measured: {one['name']}: {one['reason']}" for one in answer["missing"]]
    return "\n".join(lines)


def _cells(figure: dict[str, Any], own: bool) -> list[str]:
    spread = f"{duration(figure['p20_ms'])} to {duration(figure['p80_ms'])}"
    slower = "" if own else f"{figure['times_slower']:.3g}"
    return [duration(figure["p50_ms"]), spread, rate(figure["items_per_second"]), slower]


def _cells_over_images(figure: dict[str, Any], own: bool) -> list[str]:
    """Times over the images; of the images' own ratios the median and the least."""
    times = [duration(figure[f"{key}_ms"]) for key in ("p50", "p90", "p99", "max")]
    slower = ["", ""] if own else [f"{figure[key]:.3g}" for key in ("times_slower", "least_times_slower")]
    return [str(figure["images"]), *times, rate(figure["items_per_second"]), *slower]


def picture(figures: dict[str, Any], path: Path) -> None:
    """Bars of items a second, a panel a question; whoever computes something else is hatched.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from ernet_fast.train.pictures import INK, MUTED, PALETTE, new_figure, save_figure, style_axes

    answers = figures["answers"]
    counts = [len(answer["figures"]) for answer in answers]
    figure = new_figure(8.0, 0.8 * len(answers) + 0.32 * sum(counts) + 0.5)
    panels = figure.subplots(len(answers), 1, squeeze=False, height_ratios=[count + 1 for count in counts])
    for axes, answer in zip(panels[:, 0], answers, strict=True):
        shown = answer["figures"]
        places = range(len(shown))
        rates = [one["items_per_second"] for one in shown]
        bars = axes.barh(places, rates, color=[PALETTE[0] if place == 0 else MUTED for place in places], height=0.7)
        for bar, one in zip(bars, shown, strict=True):
            if not one["same_result"]:
                bar.set(hatch="///", edgecolor="white")
            slower = "" if one is shown[0] else f"  ({one['times_slower']:.3g} times slower)"
            axes.annotate(
                f" {rate(one['items_per_second'])}{slower}", (one["items_per_second"], bar.get_y() + 0.35),
                va="center", fontsize=8, color=INK,
            )  # fmt: skip
        names = [one["name"] + ("" if one["same_result"] else " (computes something else)") for one in shown]
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set(title=answer["title"], xlim=(0, 1.35 * max(rates)))
        style_axes(axes, grid=False)
    panels[-1, 0].set_xlabel("images per second")
    save_figure(figure, path)
