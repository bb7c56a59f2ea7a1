"""The picture of the block epilogues of every stage: bars of the contestants, and a line for the copy bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from record import Row

BARS = (("naive_ms", "naive, eager", "#b8b8b8"), ("compiled_ms", "naive, torch.compile", "#7a9cc6"))
OWN = ("fused_ms", "fused", "#1f4e79")
COPY = ("copy_time", "bytes / copy bandwidth", "#d1495b")
BATCH, LAYOUT = 8, "channels-last"


def draw_tails(rows: Sequence[Row], path: Path) -> Path:
    """Draw the rows of batch 8, channels-last, a panel for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [row for row in rows if (row.params["batch"], row.params["layout"]) == (BATCH, LAYOUT)]
    threads = sorted({row.params["threads"] for row in chosen})
    if not threads:
        raise ValueError(f"no rows of batch {BATCH}, {LAYOUT} to draw.")
    figure, axes = plt.subplots(1, len(threads), figsize=(5.2 * len(threads), 4.2), squeeze=False, sharey=True)
    for axis, count in zip(axes[0], threads, strict=True):
        panel = [row for row in chosen if row.params["threads"] == count]
        _draw_panel(axis, panel)
        axis.set_title(f"{count} thread{'s' if count > 1 else ''}", loc="left", fontsize=11)
    axes[0, 0].set_ylabel("ms, forward + backward")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.0))
    figure.text(
        0.01, 0.01, f"block epilogues of a stage, batch {BATCH}, {LAYOUT}, float32, logarithmic scale", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _draw_panel(axis, rows: Sequence[Row]) -> None:
    """Groups of bars, one a stage; numbers over the bars."""
    width = 0.27
    for place, (key, label, colour) in enumerate((*BARS, OWN)):
        at = [index + (place - 1) * width for index, row in enumerate(rows) if key in row.extra_info]
        heights = [row.extra_info[key] for row in rows if key in row.extra_info]
        bars = axis.bar(at, heights, width * 0.94, label=label, color=colour)
        texts = [f"{height:.0f}" if height >= 100 else f"{height:.3g}" for height in heights]
        for text in axis.bar_label(bars, texts, fontsize=7, padding=1, zorder=3):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4})
    for index, row in enumerate(rows):
        copied = row.extra_info[COPY[0]]
        line = {"color": COPY[2], "linewidth": 1.8, "label": COPY[1] if index == 0 else None}
        axis.plot([index - 1.5 * width, index + 1.5 * width], [copied, copied], **line)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    names = [row.params["stage"].replace("resnet", "ResNet-") for row in rows]
    axis.set_xticks(range(len(rows)), [_two_lines(name) for name in names], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", length=0)


def _two_lines(name: str) -> str:
    """ "ResNet-50-1" as network and stage."""
    network, _, stage = name.rpartition("-")
    return f"{network}\nstage {stage}"
