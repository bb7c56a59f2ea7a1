"""The demo's report: what was done, what came out, and what it does not mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernet_fast.console.tables import format_figure, interval_caption, metrics_header, metrics_rows
from ernet_fast.demo.nuclei_tour import NucleiTour
from ernet_fast.demo.pace import MOST_EPOCHS
from ernet_fast.demo.stain_tour import StainTour
from ernet_fast.demo.timing import Timing, format_seconds
from ernet_fast.diagnosis import diagnose
from ernet_fast.train import report, run_report
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.evaluation import Evaluation
from ernet_fast.train.loop import TrainResult
from ernet_fast.train.pictures import confusion_picture, history_picture, roc_picture


@dataclass(frozen=True)
class DemoFindings:
    """Everything the report tells."""

    synthetic: bool
    data: str
    settings: TrainConfig
    counts: dict[str, int]
    target: str
    tour: StainTour
    nuclei: NucleiTour
    trained: TrainResult
    evaluation: Evaluation
    timings: list[Timing]
    seconds: float


def write_page(path: Path, found: DemoFindings) -> Path:
    """Write the report; returns its path."""
    figures = found.evaluation.figures()
    facts = diagnose()
    kind = "synthetic patches" if found.synthetic else f"images of {Path(found.data).name}"
    return report.write_report(
        path,
        title="ernet_fast demo",
        subtitle=f"Stain normalisation, training and evaluation of an ER-ResNet-18 on {kind}",
        blocks=[
            _summary(found, figures),
            report.note(_caution(found, figures)),
            _stain(found),
            _nuclei(found),
            _training(found),
            _evaluation(found, figures),
            *([run_report.mistakes_block(found.evaluation, None)] if found.evaluation.mistakes else []),
            _speed(found),
            _machine(found, facts),
        ],
        footer=f"Written by ernet_fast {facts['version']}. This file holds all its pictures and needs no network.",
    )


def _summary(found: DemoFindings, figures: dict[str, Any]) -> report.Block:
    overall = figures["overall"]
    names = (
        ("accuracy", "accuracy", f"{overall['images']} test images"),
        ("precision", "precision", "of malignant"),
        ("recall", "recall", "sensitivity"),
        ("specificity", "specificity", "recall of benign"),
        ("f1", "F1", "of malignant"),
        ("auc", "AUC", "area under ROC"),
    )
    entries = [(title, format_figure(overall[key]), remark) for key, title, remark in names]
    rate = format_figure(figures["patient_recognition_rate"])
    entries.append(("patient rate", rate, f"{figures['patients']} patients"))
    return report.cards(entries)


def _caution(found: DemoFindings, figures: dict[str, Any]) -> str:
    patients, size = figures["patients"], found.settings.image_size
    common = (
        f"The test set has {patients} patients, so one patient more or less changes the patient rate by "
        f"{1 / patients:.2f}. Training was kept short ({len(found.trained.history)} epochs at {size}x{size} pixels): "
        "this shows that the parts work together, not how good the network can get."
    )
    if found.synthetic:
        return f"Synthetic data, drawn by a program: the figures say nothing about diagnostic performance. {common}"
    return f"Not for diagnostic use. {common}"


def _stain(found: DemoFindings) -> report.Block:
    tour = found.tour
    return report.section(
        "Stain normalisation",
        report.paragraph(
            "Every image gets the stains of one target (Macenko's method). The target is the training image with the "
            f"most typical stains, {found.target}. The spread of the images' mean colours (standard deviation over "
            f"{tour.measured} images, mean of the three channels) goes from {tour.spread_before:.1f} to "
            f"{tour.spread_after:.1f} grey levels."
        ),
        report.pictures(
            [(tour.picture, "Patches of six patients before and after stain normalisation, beside the target", "")]
        ),
    )


def _nuclei(found: DemoFindings) -> report.Block:
    tour = found.nuclei
    if tour.reason:
        return report.section("Nuclei", report.paragraph(f"Not looked for: {tour.reason}"))
    rows = []
    for name, (images, count, means) in tour.rows.items():
        shown = ["-" if v is None else f"{v:.{d}f}" for v, d in zip(means, (0, 1, 2), strict=True)]
        rows.append([name, str(images), str(count), *shown])
    return report.section(
        "Nuclei",
        report.paragraph(
            "Nuclei of a few test images: the haematoxylin channel, a band-pass in the frequency domain, a threshold "
            "and a watershed. Nuclei that others cover are missed, and lengths rest on an estimate of the pixel size."
        ),
        report.table(
            ["", "images", "nuclei", "per mm2", "um2", "eccentricity"], rows, caption="Means over the images."
        ),
        report.pictures(tour.pictures),
    )


def _training(found: DemoFindings) -> report.Block:
    settings, history = found.settings, found.trained.history
    there = found.counts["train"]
    trained_on = min(there, settings.max_train_images or there)
    chosen = "all of them" if trained_on == there else f"{trained_on} of {there}, evenly chosen to save time"
    seconds = sum(record["train_seconds"] for record in history)
    return report.section(
        "Training",
        report.paragraph(
            f"ER-ResNet-18 with fused shortcuts, from random weights: {trained_on} training images ({chosen}), "
            f"{_epochs(len(history), settings.epochs)}, batch {settings.batch_size}, AdamW with a one-cycle schedule "
            f"up to {settings.lr:g}, classes weighted by frequency, random flips, turns, rotations, shifts and zooms. "
            f"No patient is in two of training, validation and test. {seconds:.0f} s of training in all, "
            f"{1e3 * seconds / (len(history) * trained_on):.0f} ms an image. The checkpoint of epoch "
            f"{found.trained.best['epoch']} has the lowest validation loss and is the one evaluated."
        ),
        report.pictures([(history_picture(history), "Loss and validation figures by epoch", "")]),
    )


def _epochs(done: int, planned: int) -> str:
    if done < planned:
        return f"{done} of {planned} planned epochs (to save time)"
    return f"{done} epochs{f' (fewer than {MOST_EPOCHS}, to save time)' if done < MOST_EPOCHS else ''}"


def _evaluation(found: DemoFindings, figures: dict[str, Any]) -> report.Block:
    tested, there = figures["overall"]["images"], found.counts["test"]
    part = "" if tested == there else f" ({tested} of {there}, evenly chosen to save time)"
    predictions = found.evaluation.predictions
    return report.section(
        "Evaluation on test patients",
        report.table(
            metrics_header(),
            metrics_rows(figures),
            kind="total",
            caption=f"{tested} images of {figures['patients']} patients not seen in training{part}. Malignant is the "
            f"positive class; balanced is the mean of recall and specificity; a dash marks what is undefined.",
        ),
        report.pictures(
            [
                (confusion_picture(predictions), f"Confusion matrix: {figures['confusion_matrix']}", ""),
                (roc_picture(predictions), f"ROC curves, AUC {format_figure(figures['overall']['auc'])}", ""),
            ]
        ),
        *_uncertainty(found, figures),
    )


def _uncertainty(found: DemoFindings, figures: dict[str, Any]) -> list[report.Block]:
    """Intervals, and the ROC curves with their bands; nothing without them."""
    bootstrap = found.evaluation.bootstrap
    if bootstrap is None or figures["intervals"] is None:
        return []
    caption = f"{interval_caption(figures['intervals'])}. What other patients might have given with this network."
    return [
        run_report.intervals_table(figures, caption),
        report.pictures([run_report.roc_band_figure(found.evaluation, bootstrap, None)]),
    ]


def _speed(found: DemoFindings) -> report.Block:
    groups = []
    for timing in found.timings:
        own = next(iter(timing.seconds.values()))
        entries = [
            (name, value, format_seconds(value) + (f"  ({value / own:.1f}x)" if index else ""))
            for index, (name, value) in enumerate(timing.seconds.items())
        ]
        groups.append((timing.task, entries))
    repeats = ", ".join(str(timing.repeats) for timing in found.timings)
    return report.section(
        "Speed",
        report.paragraph(
            f"Medians of {repeats} repeats in float32, interleaved on this machine; whatever else ran slowed all of "
            "them. PyTorch stands for the same network and the same weights, the shortcut composed of PyTorch "
            "operations."
        ),
        report.bars(groups),
        *(report.paragraph(f"{timing.remark}.") for timing in found.timings if timing.remark),
    )


def _machine(found: DemoFindings, facts: dict[str, Any]) -> report.Block:
    machine, build = facts["machine"], facts["extension"]["build"]
    versions = ", ".join(f"{p['name']} {p['version']}" for p in facts["packages"] if p["version"])
    compiled = f"no: {facts['extension']['reason']}"
    if build:
        compiled = f"yes, {build['isa']} in use (of {', '.join(build['isa_variants'])})"
    devices = ", ".join(device["name"] for device in facts["cuda"]["devices"]) or f"none ({facts['cuda']['reason']})"
    plain = {key: value for key, value in found.settings.to_dict().items() if value is not None}
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"],
        ["system", f"{machine['system']}, Python {machine['python']}"],
        ["compiled operators", compiled],
        ["CUDA devices", devices],
        ["packages", versions],
        ["settings", ", ".join(f"{key}={value}" for key, value in plain.items())],
        ["time of the demo", f"{found.seconds:.0f} s"],
    ]
    return report.section("Machine, versions and settings", report.table(["", ""], rows, kind="text"))
