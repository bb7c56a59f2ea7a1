"""Tables and pictures of whole networks: `bench_models`, runtimes, fine-tuning after conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from record import Row
from records import Records
from tables import (
    NONE,
    NOT_MEASURED,
    TARGETS,
    Column,
    Table,
    cpu_name,
    figure,
    markdown,
    number,
    percent,
    starred,
    table,
    time_of,
)

MIB = 2.0**20
README_MODEL = ("er_resnet50", 8)
PHASES = ("plain", "calibrated", "uncalibrated", "control")


def model_rows(records: Records, model: str, batch: int) -> list[Row]:
    """The networks of one case of `bench_models`, the plain one first; of the newest record that has them."""
    rows = [
        row
        for row in records.rows("cpu", "bench_models")
        if (row.params["model"], row.params["batch"]) == (model, batch)
    ]
    return sorted(rows, key=lambda row: row.extra_info["place"])


def models(records: Records) -> str:
    """README's table; the picture stands over it as soon as there are rows to draw."""
    rows = model_rows(records, *README_MODEL)
    if not rows:
        return f"{NOT_MEASURED} `python3 dev.py bench bench_models` measures it."
    first, size = rows[0].extra_info["figures"], rows[0].params["size"]
    head = (
        "", "training step", "of plain", "images/s", "peak of tensors", "of it activations", "of plain", "inference",
        "of plain",
    )  # fmt: skip
    lines = [_model_cells(row, first) for row in rows]
    said = (
        f"{README_MODEL[1]} images of {size} x {size}, float32, channels-last, {rows[0].extra_info['threads']} threads"
    )
    return f"![Speed and memory of the networks](docs/model_speed.png)\n\n{said}:\n\n{markdown(head, lines)}"


def _model_cells(row: Row, plain: dict[str, Any]) -> list[str]:
    mine = row.extra_info["figures"]
    step, inference = mine["step"]["p50_ms"], mine.get("inference", {}).get("p50_ms")
    name = f"**{mine['name']}**" if mine["key"] in ("er", "lean") else mine["name"]
    return [
        starred(name, row), f"{time_of(step)}{row.few}", number(step / plain["step"]["p50_ms"]),
        number(mine["step_images_per_second"]), f"{mine['peak_bytes'] / MIB:.0f} MiB",
        f"{mine['activation_bytes'] / MIB:.0f} MiB", number(mine["activation_bytes"] / plain["activation_bytes"]),
        time_of(inference), NONE if inference is None else number(inference / plain["inference"]["p50_ms"]),
    ]  # fmt: skip


def models_picture(records: Records) -> Any:
    """The bars of `ernet-fast bench model`; None without rows."""
    from ernet_fast.benchmark.show_model import model_figure

    rows = model_rows(records, *README_MODEL)
    if not rows:
        return None
    images = f"{README_MODEL[1]} images of {rows[0].params['size']} x {rows[0].params['size']}"
    where = f"{cpu_name(records.of('cpu')[0].machine)}, {rows[0].extra_info['threads']} threads"
    return model_figure([row.extra_info["figures"] for row in rows], f"{where}, {images}, float32")


def tuning_rows(records: Records) -> list[Row]:
    """The phases of the newest study of real images."""
    rows = [row for row in records.rows("cpu", "finetune_converted") if row.params["data"] != "generated"]
    data = rows[0].params["data"] if rows else ""
    return sorted(
        (row for row in rows if row.params["data"] == data), key=lambda row: PHASES.index(row.extra_info["phase"])
    )


def tuning(records: Records) -> str:
    """What each network was before fine-tuning and after it, on the patients held out."""
    rows = tuning_rows(records)
    if not rows:
        return NOT_MEASURED
    info = rows[0].extra_info
    settings = info["settings"]
    said = (
        f"{rows[0].params['data']}: {info['train_images']} images of {info['train_patients']} patients to train on, "
        f"{info['images']} of {info['patients']} held out ({info['positive']} malignant), {settings['size']} x "
        f"{settings['size']} pixels; ResNet-{settings['depth']} with {settings['base_channels']} channels in its stem; "
        f"AdamW, batch {settings['batch']}, {settings['epochs']} epochs at {settings['lr']:g}, then "
        f"{settings['tuning_epochs']} at {settings['tuning_lr']:g}, cosine; one seed."
    )
    return f"{said}\n\n{table(rows, TUNING)}"


def _shown(when: int, key: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        epoch = row.extra_info["history"][when]
        return f"{100 * epoch[key]:.1f} % ({epoch['right']})" if key == "accuracy" else f"{epoch[key]:.3f}"

    return cell


TUNING = (
    Column("network", lambda row: starred(row.extra_info["title"].rpartition(", ")[0], row)),
    figure("same class as the plain network", "top1", percent), figure("correlation of logits", "correlation"),
    Column("accuracy before (images)", _shown(0, "accuracy")), Column("AUC before", _shown(0, "auc")),
    Column("epochs", lambda row: str(len(row.extra_info["history"]) - 1)),
    Column("accuracy after", _shown(-1, "accuracy")), Column("AUC after", _shown(-1, "auc")),
)  # fmt: skip


def tuning_picture(records: Records) -> Any:
    """Accuracy and area under the ROC curve by epoch: the plain network, then what goes on from it."""
    from ernet_fast.train.pictures import INK, PALETTE, new_figure, style_axes

    rows = tuning_rows(records)
    if not rows:
        return None
    figure = new_figure(9.0, 3.2)
    panels = figure.subplots(1, 2)
    begin = len(rows[0].extra_info["history"]) - 1
    for axes, (key, title) in zip(panels, (("accuracy", "Accuracy"), ("auc", "Area under the ROC curve")), strict=True):
        for row, colour in zip(rows, PALETTE, strict=False):
            history = row.extra_info["history"]
            first = 0 if row.extra_info["phase"] == "plain" else begin
            places = [first + epoch["epoch"] for epoch in history]
            label = row.extra_info["title"].rpartition(", ")[0]
            axes.plot(places, [epoch[key] for epoch in history], color=colour, marker="o", ms=3, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.axvline(begin, color="#e4e7eb", linewidth=1.0)
        axes.set(xlabel="epoch", title=f"{title}, patients held out")
        style_axes(axes)
    panels[0].legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")
    return figure


RUNTIMES = (
    Column("network", lambda row: starred(f"ER-ResNet-{row.params['depth']}, batch {row.params['batch']}", row)),
    figure("plain, folded", "plain_ms", time_of), Column("ER", lambda row: f"**{time_of(row.p50)}**{row.few}"),
    figure("of plain", "plain_share"), figure("of compiled plain", "compiled_share"),
    *(column for runtime, name in (("onnxruntime", "onnxruntime"), ("openvino", "OpenVINO")) for column in (
        figure(f"{name}: plain", f"{runtime}_plain_ms", time_of), figure("ER", f"{runtime}_er_ms", time_of),
        figure("of plain", f"{runtime}_share"))),
    TARGETS,
)  # fmt: skip
TABLES: dict[str, Callable[[Records], str]] = {
    "readme-models": models,
    "er-inference": Table("bench_er_inference", "inference", RUNTIMES),
    "fine-tuning": tuning,
}
PICTURES: dict[str, Callable[[Records], Any]] = {"model_speed.png": models_picture, "fine_tuning.png": tuning_picture}
