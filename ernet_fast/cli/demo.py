"""``ernet-fast demo``: the whole library in 90 seconds."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ernet_fast.cli.streams import print_json
from ernet_fast.console.progress import Reporter
from ernet_fast.console.tables import format_table, metrics_header, metrics_rows
from ernet_fast.demo import DemoConfig, run_demo


def add_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command."""
    default = DemoConfig()
    parser = commands.add_parser(
        "demo",
        parents=parents,
        help="normalise, train, evaluate and time on a small set, in 90 seconds",
        description="Normalise the stains of histology patches, train an ER-ResNet-18 with validation on other "
        "patients, evaluate it on test patients, time the library against its alternatives, and write one "
        "self-contained report.html.",
    )
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="images in the BreakHis layout; default: synthetic ones are drawn")
    add("--out", metavar="FOLDER", default=default.out, help=f"default: {default.out}")
    add("--epochs", type=int, metavar="N", help="default: 8, or fewer on a slow machine")
    size = f"pixels of the network's input (default: {default.image_size})"
    add("--image-size", type=int, metavar="N", default=default.image_size, help=size)
    most = f"train on at most N images, evenly chosen (default: {default.max_images})"
    add("--max-images", type=int, metavar="N", default=default.max_images, help=most)
    add("--seed", type=int, metavar="N", default=default.seed, help=f"default: {default.seed}")
    add("--device", choices=("auto", "cpu", "cuda"), default=default.device, help="default: auto")
    add("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    config = DemoConfig(**{item.name: getattr(arguments, item.name) for item in fields(DemoConfig)})
    result = run_demo(config, Reporter(quiet=arguments.quiet))
    if arguments.json:
        print_json(result.figures)
        return 0
    evaluation, epochs = result.figures["evaluation"], len(result.figures["history"])
    print(f"\nTest patients ({evaluation['patients']}), best epoch {evaluation['epoch']} of {epochs}:\n")
    print(format_table(metrics_header(), metrics_rows(evaluation)), end="\n\n")
    print(*result.timing_lines, sep="\n")
    print(f"\n{result.seconds:.0f} s in all. Report: {result.report}")
    return 0
