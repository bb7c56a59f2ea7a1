"""``ernet-fast evaluate``: figures of merit of a checkpoint."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ernet_fast.cli.json_output import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_table, metrics_header, metrics_rows
from ernet_fast.train import evaluate
from ernet_fast.train.device import finish_together


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=parents,
        help="evaluate a checkpoint",
        description="Evaluate a checkpoint of `ernet-fast train` on images in the BreakHis layout, overall and by "
        "magnification. Images get the size and the stain normalisation of the training.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file best.pt or last.pt of a run")
    parser.add_argument("--data", metavar="FOLDER", help="folder with images; default: that of the training")
    parser.add_argument(
        "--split", choices=("test", "val", "train", "all"), default="test", help="which part of it (default: test)"
    )
    parser.add_argument("--magnifications", type=int, nargs="+", metavar="M", help="default: those of the training")
    parser.add_argument("--split-file", metavar="FILE", help="CSV split instead of the training's")
    parser.add_argument("--max-images", type=int, metavar="N", help="look at no more than N images, evenly chosen")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a step; default: that of the training")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", default=0, help="processes that read images (default: 0)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--on-error", choices=("raise", "skip"), help="unusable image: stop, or leave it out")
    parser.add_argument(
        "--out", metavar="FOLDER", help="write metrics.json, predictions.csv, confusion_matrix.png and roc.png there"
    )
    parser.add_argument("--patients", action="store_true", help="also list the score of every patient")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    first = int(os.environ.get("RANK", "0")) == 0
    result = evaluate(
        arguments.checkpoint,
        data=arguments.data,
        split=arguments.split,
        magnifications=None if arguments.magnifications is None else tuple(arguments.magnifications),
        split_file=arguments.split_file,
        max_images=arguments.max_images,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        device=arguments.device,
        on_error=arguments.on_error,
        reporter=Reporter(quiet=arguments.quiet, mute=not first),
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
    print(format_table(metrics_header(), metrics_rows(figures)))
    rate = figures["patient_recognition_rate"]
    print(f"\npatients {figures['patients']}, patient recognition rate {rate:.3f}, cross-entropy {figures['loss']:.4f}")
    if arguments.patients:
        rows = [[patient, f"{score:.3f}"] for patient, score in figures["patient_scores"].items()]
        print("\n" + format_table(["patient", "score"], rows))
    for skipped in figures["skipped"]:
        print(f"skipped {skipped['path']}: {skipped['reason']}")
    if arguments.out is not None:
        print(f"\nwritten to {arguments.out}")
    return 0
