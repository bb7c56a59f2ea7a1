"""The report of an attention: what it predicts, beside the mean of the images, and which fields it weighs."""

from __future__ import annotations

from pathlib import Path

from ernet_fast._version import __version__
from ernet_fast.attend.result import AttendResult, BagResult
from ernet_fast.console.tables import format_figure
from ernet_fast.data import read_image
from ernet_fast.train import report
from ernet_fast.train.pictures import INK, PALETTE, new_figure, save_figure, style_axes

_SHOWN_BAGS, _SHOWN_FIELDS = 6, 6
_FIGURES = (
    ("bags", "bags"), ("accuracy", "accuracy"), ("balanced_accuracy", "balanced"), ("recall", "recall"),
    ("specificity", "specificity"), ("f1", "F1"), ("auc", "AUC"),
)  # fmt: skip


def write_page(path: Path, result: AttendResult) -> Path:
    """Write the report; returns its path."""
    source = result.checkpoint["checkpoint"]
    return report.write_report(
        path,
        title="Attention over magnifications",
        subtitle=f"One prediction a {result.settings.by}, from its fields at all magnifications; network {source}",
        blocks=[
            report.note(_caution(result)),
            _metrics(result),
            _magnifications(result),
            _fields(result),
            _bags(result),
            _training(result),
        ],
        footer=f"Written by ernet_fast {__version__}. This file holds all its pictures and needs no network.",
    )


def _caution(result: AttendResult) -> str:
    tested = result.metrics()["attention"]["bags"]
    return (
        f"Not for diagnostic use. The test set has {tested} {result.settings.by}s: one more or less that is right "
        f"changes the accuracy by {1 / max(1, tested):.2f}. Weights say what the prediction was computed from, not "
        "why, and not where a tumour is. The network has seen the training images, so their embeddings look easier."
    )


def _metrics(result: AttendResult) -> report.Block:
    rows = []
    for part in ("test", "val", "train"):
        for name, title in (("attention", "attention"), ("mean", "mean of the images")):
            figures = result.metrics(part)[name]
            rows.append([f"{part}, {title}", *(format_figure(figures[key]) for key, _ in _FIGURES)])
    return report.section(
        "Prediction",
        report.table(
            ["", *(title for _, title in _FIGURES)],
            rows,
            caption=f"A bag is a {result.settings.by}. The mean of its images' probabilities by the network alone is "
            "what attention has to surpass. Validation bags chose the epoch.",
        ),
    )


def _magnifications(result: AttendResult) -> report.Block:
    rows = [
        [f"{power}X", str(entry["bags"]), f"{entry['attention']:.3f}", f"{entry['fields']:.3f}"]
        for power, entry in result.attention_by_magnification().items()
    ]
    return report.section(
        "Attention by magnification",
        report.table(
            ["", "test bags", "share of attention", "share of fields"], rows,
            caption="Means over the bags that have fields of the magnification. Equal shares: no preference.",
        ),
    )  # fmt: skip


def _fields(result: AttendResult) -> report.Block:
    tested = [entry for entry in result.bags if entry.part == "test" and len(entry.bag.fields) > 1]
    tested.sort(key=lambda entry: max(entry.weights) * len(entry.weights), reverse=True)
    pictures = [
        (_strip(result, entry), f"Fields of {entry.bag.name}", _told(result, entry)) for entry in tested[:_SHOWN_BAGS]
    ]
    return report.section(
        "Fields",
        report.paragraph(
            f"The test {result.settings.by}s whose attention is least even: their fields with the most attention, and "
            "on the right the one with the least. Below each its magnification, and its weight as a multiple of an "
            "even one."
        ),
        *(report.pictures([picture]) for picture in pictures),
    )


def _told(result: AttendResult, entry: BagResult) -> str:
    truth, values = result.classes[entry.bag.label], entry.probabilities
    guess = max(range(len(values)), key=values.__getitem__)
    told = f"{entry.bag.name}: {truth}, predicted {result.classes[guess]} ({values[guess]:.2f})"
    return f"{told}, {len(entry.weights)} fields"


def _strip(result: AttendResult, entry: BagResult) -> bytes:
    order = sorted(range(len(entry.weights)), key=entry.weights.__getitem__, reverse=True)
    shown = order if len(order) <= _SHOWN_FIELDS else [*order[: _SHOWN_FIELDS - 1], order[-1]]
    figure = new_figure(1.5 * _SHOWN_FIELDS, 1.75)
    grid = figure.subplots(1, _SHOWN_FIELDS, squeeze=False)[0]
    for axes in grid:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, place in zip(grid, shown, strict=False):
        sample = result.samples[entry.bag.fields[place]]
        axes.imshow(read_image(sample.path).permute(1, 2, 0).numpy())
        times = entry.weights[place] * len(entry.weights)
        axes.set_xlabel(f"{sample.magnification}X, {times:.2f}x", size=8, color=INK)
    return save_figure(figure, None)


def _bags(result: AttendResult) -> report.Block:
    rows = []
    for entry in result.bags:
        if entry.part == "test":
            values = entry.probabilities
            guess = result.classes[max(range(len(values)), key=values.__getitem__)]
            shown = f"{max(values):.3f}", f"{entry.mean_probabilities[values.index(max(values))]:.3f}"
            truth = result.classes[entry.bag.label]
            mark = "" if guess == truth else "wrong"
            rows.append([entry.bag.name, entry.patient, str(len(entry.bag.fields)), truth, guess, *shown, mark])
    header = [result.settings.by, "patient", "fields", "true", "predicted", "probability", "by the mean", ""]
    return report.section(f"Test {result.settings.by}s", report.table(header, rows))


def _training(result: AttendResult) -> report.Block:
    figure = new_figure(5.2, 2.8)
    axes = figure.subplots()
    steps = range(1, len(result.history) + 1)
    for key, colour, name in (("train_loss", PALETTE[0], "training"), ("val_loss", PALETTE[1], "validation")):
        values = [record[key] for record in result.history]
        if None not in values:
            axes.plot(steps, values, color=colour, label=name)
    axes.set(xlabel="epoch", ylabel="cross-entropy of bags")
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)
    settings = ", ".join(f"{name}={value}" for name, value in result.settings.to_dict().items())
    network = ", ".join(f"{name}={value}" for name, value in result.checkpoint.items())
    return report.section(
        "Training",
        report.pictures([(save_figure(figure, None), "Loss by epoch", "")]),
        report.table(["", ""], [["attention", settings], ["network", network]], kind="text"),
    )
