"""``ernet-fast evaluate``: metrics of a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console import tables
from ernet_fast.console.progress import Reporter
from ernet_fast.data.splits import SPLIT_NAMES
from ernet_fast.train import Bootstrap, evaluate
from ernet_fast.train.device import finish_together, is_first_process


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=parents,
        help="evaluate a checkpoint",
        description="Evaluate a checkpoint of `ernet-fast train` on images in the BreakHis layout, overall and by "
        "magnification. Images get the size and the stain normalisation of the training.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="RUN", help="folder of a run (its best.pt), or a file best.pt or last.pt")
    add("--data", metavar="FOLDER", help="folder with images; default: that of the training")
    add("--split", choices=SPLIT_NAMES, default="test", help="which part of it (default: test)")
    add("--magnifications", type=int, nargs="+", metavar="M", help="default: those of the training")
    add("--split-file", metavar="FILE", help="CSV split instead of the training's")
    add("--max-images", type=int, metavar="N", help="look at no more than N images, evenly chosen")
    add("--batch-size", type=int, metavar="N", help="images a step; default: that of the training")
    add("--num-workers", type=int, metavar="N", default=0, help="processes that read images (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--on-error", choices=("raise", "skip"), help="unusable image: stop, or leave it out")
    add("--resamples", type=int, metavar="N", default=2000, help="of the intervals; 0: no intervals (default: 2000)")
    add("--mistakes", type=int, metavar="N", default=8, help="worst mistakes in the report, with Grad-CAM (default: 8)")
    add("--out", metavar="FOLDER", help="write report.html, metrics.json, predictions.csv and the pictures there")
    add("--patients", action="store_true", help="also list the score of every patient")
    add("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    first = is_first_process()
    names = ("data", "split", "split_file", "max_images", "batch_size", "num_workers", "device", "on_error")
    result = evaluate(
        arguments.checkpoint,
        magnifications=None if arguments.magnifications is None else tuple(arguments.magnifications),
        bootstrap=Bootstrap(arguments.resamples) if arguments.resamples else None,
        mistakes=0 if arguments.out is None else arguments.mistakes,
        reporter=Reporter(quiet=arguments.quiet, mute=not first),
        **{name: getattr(arguments, name) for name in names},
    )
    finish_together()
    if not first:
        return 0
    figures = result.figures()
    if arguments.out is not None:
        result.write(arguments.out)
    if arguments.json:
        print_json(figures)
        return 0
    print(tables.format_table(tables.metrics_header(), tables.metrics_rows(figures)))
    print("\n" + tables.format_table(tables.patient_header(), tables.patient_rows(figures)))
    if figures["intervals"]:
        print(f"\n{tables.interval_caption(figures['intervals'])}\n")
        print(tables.format_table(tables.interval_header(), tables.interval_rows(figures)))
    rate = tables.format_figure(figures["patient_recognition_rate"])
    print(f"\npatients {figures['patients']}, patient recognition rate {rate}, cross-entropy {figures['loss']:.4f}")
    if arguments.patients:
        rows = [[patient, tables.format_figure(score)] for patient, score in figures["patient_scores"].items()]
        print("\n" + tables.format_table(["patient", "score"], rows))
    for skipped in figures["skipped"]:
        print(f"skipped {skipped['path']}: {skipped['reason']}")
    if arguments.out is not None:
        print(f"\nwritten to {arguments.out}")
    return 0
