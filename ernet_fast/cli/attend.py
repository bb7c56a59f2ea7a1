"""``ernet-fast attend``: one prediction a slide or patient, by attention over its fields at all magnifications."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ernet_fast.attend import AttendResult, AttendSettings, attend
from ernet_fast.attend.bags import UNITS
from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_figure, format_table
from ernet_fast.models.attention_pool import POOLS

_MEANINGS = {
    "features": "length of a projected embedding",
    "heads": "heads of --pool multihead",
    "dropout": "dropout of projected embeddings",
    "epochs": "passes over the training bags, on embeddings that are kept",
    "tune_epochs": "further passes that train the network too, end to end",
    "fields": "fields of a bag in a training step",
    "batch_size": "bags a step",
    "lr": "learning rate of AdamW",
    "tune_lr": "that of the network, with --tune-epochs",
    "weight_decay": "of AdamW",
    "seed": "of weights, order and choice of fields",
}
_SHOWN = ("bags", "accuracy", "balanced_accuracy", "recall", "specificity", "f1", "auc")


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "attend",
        parents=parents,
        help="predict slides or patients by attention over their fields",
        description="Train attention over the fields of each slide or patient, at all magnifications, on the "
        "embeddings of a trained network and by its own split, and predict every slide or patient. Writes "
        "attention.pt, embeddings.pt, bags.csv, attention.csv (the weight of every field), metrics.json and "
        "report.html.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="RUN", help="folder of a run (its best.pt), or a file best.pt or last.pt")
    add("--out", metavar="FOLDER", required=True, help="folder to write to, made if missing")
    add("--data", metavar="FOLDER", help="folder with images; default: that of the training")
    add("--by", choices=UNITS, default=AttendSettings.by, help="what is predicted (default: %(default)s)")
    pool = "gated attention pooling, or self-attention of several heads (default: %(default)s)"
    add("--pool", choices=POOLS, default=AttendSettings.pool, help=pool)
    for item in fields(AttendSettings):
        if item.name in _MEANINGS:
            kind = type(item.default)
            text = f"{_MEANINGS[item.name]} (default: %(default)s)"
            add(f"--{item.name.replace('_', '-')}", type=kind, metavar="X", default=item.default, help=text)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the network (default: auto)")
    add("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Attend; returns the exit code."""
    settings = AttendSettings(**{item.name: getattr(arguments, item.name) for item in fields(AttendSettings)})
    result = attend(
        arguments.checkpoint, arguments.out, settings=settings, data=arguments.data, device=arguments.device,
        reporter=Reporter(quiet=arguments.quiet),
    )  # fmt: skip
    if arguments.json:
        parts = {part: result.metrics(part) for part in ("train", "val", "test")}
        print_json({"metrics": parts, "attention_by_magnification": result.attention_by_magnification()})
    else:
        _print(result)
    return 0


def _print(result: AttendResult) -> None:
    rows = []
    for part in ("test", "val"):
        for name, figures in result.metrics(part).items():
            rows.append([f"{part}, {name}", *(format_figure(figures[key]) for key in _SHOWN)])
    print(format_table([f"by {result.settings.by}", *(name.replace("_", " ") for name in _SHOWN)], rows))
    for power, entry in result.attention_by_magnification().items():
        print(f"{power}X: {entry['attention']:.3f} of the attention, {entry['fields']:.3f} of the fields")
    print(f"\nwritten to {result.folder}; see {result.folder / 'report.html'}")
