"""The report of an evaluation: one HTML file, and its pictures beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernet_fast.console import tables
from ernet_fast.train import evaluation_pictures, paper, pictures, report
from ernet_fast.train.bootstrap import Bootstrap
from ernet_fast.train.config import TrainConfig
from ernet_fast.train.findings import Findings

Picture = tuple[bytes, str, str]
"""PNG file, description for those who do not see it, caption."""


def write_run_report(evaluation: Findings, folder: Path) -> Path:
    """Write `report.html` and each of its pictures as a PNG file into `folder`; returns the report's path."""
    figures = evaluation.figures()
    made = evaluation_blocks(evaluation, figures, folder)
    config = TrainConfig.from_dict(evaluation.settings)
    return report.write_report(
        folder / "report.html",
        title=f"{config.model} on {Path(figures['data']).name}",
        subtitle=f"{evaluation.checkpoint}, epoch {evaluation.epoch}; {evaluation.split} split, {_count(figures)}",
        blocks=[
            _cards(figures),
            report.note(_caution(evaluation, figures)),
            *made,
            _paper_tables(config, figures),
            _curves(evaluation, folder),
            _circumstances(evaluation, figures),
        ],
        footer=f"Written by ernet_fast {figures['environment']['ernet_fast']}. This file holds all its pictures and "
        "needs no network. The same figures as plain values: metrics.json.",
    )


def _count(figures: dict[str, Any]) -> str:
    return f"{figures['overall']['images']} images of {figures['patients']} patients"


def _cards(figures: dict[str, Any]) -> report.Block:
    found = figures["intervals"]["overall"] if figures["intervals"] else {}
    patients = figures["by_patient"]["overall"]
    groups = [(figures["overall"], key, title) for key, title in tables.FIGURES[1:]]
    groups += [(patients, "patient_recognition_rate", "patient rate"), (patients, "patient_auc", "patient AUC")]
    return report.cards(
        [
            (title, tables.format_figure(group[key]), tables.format_interval(found.get(key)))
            for group, key, title in groups
        ]
    )


def _caution(evaluation: Findings, figures: dict[str, Any]) -> str:
    if evaluation.seen_patients:
        return (
            f"The network was trained on {evaluation.seen_images} of these images and on {evaluation.seen_patients} of "
            "their patients: the figures do not measure how it does on new patients."
        )
    return (
        "Not for diagnostic use. Intervals say what other patients of the same kind might have given with the same "
        f"network; with {figures['patients']} patients they are rather too narrow than too wide, and they do not hold "
        "for another laboratory."
    )


def evaluation_blocks(evaluation: Findings, figures: dict[str, Any], folder: Path | None) -> list[report.Block]:
    """Sections on what came out: figures with intervals, confusion matrices, ROC, calibration, the worst mistakes.

    Pictures are written into `folder`, if given, too.
    """
    blocks = [
        _figures(figures),
        _pictures_by_magnification(evaluation, figures, folder),
        _calibration(evaluation, folder),
    ]
    return [*blocks, mistakes_block(evaluation, folder)] if evaluation.mistakes else blocks


def _figures(figures: dict[str, Any]) -> report.Block:
    positive = (
        f"{figures['classes'][1]} is the positive class" if len(figures["classes"]) == 2 else "means over classes"
    )
    blocks = [
        report.table(
            tables.metrics_header(), tables.metrics_rows(figures), kind="total",
            caption=f"By image; {positive}, balanced is the mean recall of the classes; a dash: undefined.",
        ),
        report.table(
            tables.patient_header(), tables.patient_rows(figures), kind="total",
            caption="By patient: mean share of a patient's images that are right (Spanhol et al.), and the AUC of the "
            "patients' mean probabilities.",
        ),
    ]  # fmt: skip
    if figures["intervals"]:
        caption = tables.interval_caption(figures["intervals"])
        blocks.append(intervals_table(figures, caption))
    return report.section("Figures", *blocks)


def intervals_table(figures: dict[str, Any], caption: str) -> report.Block:
    """The intervals of all figures by image."""
    return report.table(tables.interval_header(), tables.interval_rows(figures), kind="total", caption=caption)


def _drawn(
    folder: Path | None, name: str, draw: Callable[[Path | None], bytes], text: str, caption: str = ""
) -> Picture:
    return draw(None if folder is None else folder / name), text, caption


def _pictures_by_magnification(evaluation: Findings, figures: dict[str, Any], folder: Path | None) -> report.Block:
    found, bootstrap = evaluation.predictions, evaluation.bootstrap
    shown = [
        _drawn(folder, "confusion_matrix.png", lambda path: pictures.confusion_picture(found, path),
               f"Confusion matrix: {figures['confusion_matrix']}"),
        _drawn(folder, "roc.png", lambda path: pictures.roc_picture(found, path), "ROC curves"),
    ]  # fmt: skip
    if len(found.by_magnification()) > 1:
        shown.append(
            _drawn(folder, "confusion_by_magnification.png",
                   lambda path: evaluation_pictures.confusion_panels(found, path), "Confusion matrix by magnification")
        )  # fmt: skip
    if bootstrap is not None:
        mean = "" if len(found.classes) == 2 else "Mean of the classes, each against the rest. "
        caption = f"{mean}With the pointwise {100 * bootstrap.level:g} % band of the sensitivity, over patients."
        shown.append(roc_band_figure(evaluation, bootstrap, folder, caption))
    return report.section("Confusion and ROC", report.pictures(shown[:2]), *(report.pictures([p]) for p in shown[2:]))


def roc_band_figure(evaluation: Findings, bootstrap: Bootstrap, folder: Path | None, caption: str = "") -> Picture:
    """ROC curves with their bands."""
    found = evaluation.predictions
    return _drawn(
        folder, "roc_bands.png", lambda path: evaluation_pictures.roc_panels(found, bootstrap, path),
        "ROC curves with bands, by magnification", caption,
    )  # fmt: skip


def _calibration(evaluation: Findings, folder: Path | None) -> report.Block:
    found = evaluation.predictions
    text = (
        "Bars: share of images that are right, by the probability of the predicted class; dots: mean probability in "
        "the bin; on the dashed line the two agree. ECE is the mean distance, weighted by the images of a bin."
    )
    shown = _drawn(
        folder,
        "reliability.png",
        lambda path: evaluation_pictures.reliability_picture(found, path),
        "Reliability diagram",
    )
    return report.section("Calibration", report.pictures([shown]), report.paragraph(text))


def mistakes_block(evaluation: Findings, folder: Path | None) -> report.Block:
    """The worst mistakes with Grad-CAM, as a picture and in words."""
    found, classes = evaluation.mistakes, evaluation.predictions.classes
    facts = [mistake.facts(classes) for mistake in found]
    header = ["image", "patient", "magnification", "true", "called", "probability", "of the true class"]
    rows = [
        [str(fact[key]) for key in ("image", "patient", "magnification", "true", "predicted")]
        + [tables.format_figure(fact["p_predicted"]), tables.format_figure(fact["p_true"])]
        for fact in facts
    ]
    shown = _drawn(
        folder, "mistakes.png", lambda path: evaluation_pictures.mistakes_picture(found, classes, path),
        "The images that the network is most wrong about, each beside what it looked at",
        "Above an image: patient, magnification, true class. Bright: what spoke for the wrong class (Grad-CAM).",
    )  # fmt: skip
    return report.section("Worst mistakes", report.pictures([shown]), report.table(header, rows, kind="text"))


def _paper_tables(config: TrainConfig, figures: dict[str, Any]) -> report.Block:
    return report.section(
        "In the form of the paper's tables",
        report.table(
            paper.TABLE_1_HEADER, paper.table_1([config]),
            caption=f"Table 1: with {paper.CLASSES} classes, one image of {paper.SIZE}x{paper.SIZE}. "
            "Multiply-accumulates times two, of convolutions, classifier and ER sums.",
        ),
        report.table(paper.table_2_header(), paper.table_2(figures), caption="Table 2: this run, by magnification."),
        *(report.paragraph(text) for text in paper.CONTRADICTIONS),
    )  # fmt: skip


def _curves(evaluation: Findings, folder: Path) -> report.Block:
    picture = _drawn(
        folder, "history.png", lambda path: pictures.history_picture(evaluation.history, path),
        "Loss and validation figures by epoch",
    )  # fmt: skip
    return report.section(
        f"Training, {len(evaluation.history)} epochs up to this checkpoint", report.pictures([picture])
    )


def _circumstances(evaluation: Findings, figures: dict[str, Any]) -> report.Block:
    there, settings = figures["environment"], evaluation.settings
    packages = ", ".join(f"{name} {version}" for name, version in there["packages"].items())
    rows = [
        ["seed", f"{settings['seed']} (weights, split, order, augmentation)"],
        ["settings", ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)],
        [
            "processor",
            f"{there['processor']}, {there['cores']} cores, {there['threads']} threads, {there['instruction_set']}",
        ],
        ["CUDA devices", ", ".join(there["cuda"]) or "none"],
        ["system", f"{there['system']}, Python {there['python']}"],
        ["packages", packages],
    ]
    return report.section("Seed, settings and environment of the evaluation", report.table(["", ""], rows, kind="text"))
