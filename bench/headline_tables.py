"""The three figures at the head of README.md."""

from __future__ import annotations

from collections.abc import Callable

from macenko_tables import OWN, one_image, ratios_of, time_cell
from records import Records
from tables import cpu_name, markdown, number, starred, time_of


def first_screen(records: Records) -> str:
    """A patch, the shortcuts of a stage, a training step: how long, against what, on which machine."""
    group = records.of("cpu")
    if not group:
        return "Not yet measured."
    rows, lines = one_image(group), []
    own, peer = (rows.get(("normalize", who, "224x224")) for who in (OWN[0], "torchstain numpy"))
    if own is not None:
        times = f"{ratios_of(peer)} as fast as torchstain's NumPy (the median of many images; the worst)"
        lines.append(["Macenko, one patch of 224 x 224, one thread: median; worst image", time_cell(own), times])
    for row in records.rows("cpu", "bench_er_stage", "stage_epilogues"):
        if tuple(row.params.get(key) for key in ("stage", "batch", "layout", "threads")) == (
            "resnet50-1", 8, "channels-last", 1
        ):  # fmt: skip
            times = f"{row.extra_info['ratio_naive']:.3g}x as fast as composed naively"
            what = "the shortcuts of an ER-ResNet-50's first stage, forward + backward, batch 8, one thread"
            lines.append([starred(what, row), time_of(row.extra_info["fused_ms"]), times])
    for row in records.rows("cpu", "bench_er_training", "training_step"):
        if (row.params["depth"], row.params["batch"]) == (50, 16):
            share = number(row.extra_info["fused_ms"] / row.extra_info["plain_ms"])
            what = "a training step of an ER-ResNet-50, batch 16, all cores"
            lines.append([starred(what, row), time_of(row.extra_info["fused_ms"]), f"{share} of a plain ResNet-50's"])
    machine = group[0].machine
    return markdown([f"{cpu_name(machine)}, {machine['cores']} cores", "takes", "that is"], lines)


TABLES: dict[str, Callable[[Records], str]] = {"readme-first": first_screen}
